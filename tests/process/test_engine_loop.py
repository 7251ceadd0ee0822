"""The engine at its socket, without a client: Ready, numbering, backlog, requests that cannot run."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from app.client.process import EngineProcess
from app.core.config import EngineConfig
from app.core.types import EngineOutput, EngineRequest, FinishReason
from app.ipc.messages import Abort, Add, FromEngine, Ready, StepOutputs, ToEngine
from app.ipc.progress import EnginePhase
from app.ipc.transport import FrameBuffer, encode_frame
from tests.process.engines import WAIT_SECONDS, request, scripted


class Peer:
    """The API process's place, with blocking reads."""

    def __init__(self, process: EngineProcess) -> None:
        self.process = process
        self.socket: socket.socket = process.socket
        self.socket.settimeout(WAIT_SECONDS)
        self._messages = self._read()
        self.num_read = 0

    def send(self, message: ToEngine) -> None:
        self.socket.sendall(encode_frame(message))

    def receive(self) -> FromEngine:
        message = next(self._messages)
        assert message.seq == self.num_read
        self.num_read += 1
        return message

    def receive_step(self) -> StepOutputs:
        message = self.receive()
        assert isinstance(message, StepOutputs)
        return message

    def collect(self, num_finishes: int) -> dict[str, list[EngineOutput]]:
        """Read until so many sequences have finished."""
        found: dict[str, list[EngineOutput]] = {}
        while num_finishes:
            for output in self.receive_step().outputs:
                found.setdefault(output.request_id, []).append(output)
                num_finishes -= output.finish_reason is not None
        return found

    def phase(self) -> EnginePhase | None:
        progress = self.process.progress.read()
        return None if progress is None else progress.phase

    def wait_for_phase(self, phase: EnginePhase) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while self.phase() is not phase:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def _read(self) -> Iterator[FromEngine]:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        frames = FrameBuffer()
        while data := self.socket.recv(1 << 16):
            for body in frames.feed(data):
                yield decoder.decode(body)


@contextmanager
def peer(config: EngineConfig) -> Iterator[Peer]:
    process = EngineProcess.spawn(7, config)
    try:
        yield Peer(process)
    finally:
        process.kill()
        while process.returncode is None:
            time.sleep(0.005)
        process.close()


def test_ready_announces_the_smaller_of_the_models_context_and_the_pool() -> None:
    with peer(scripted(max_model_len=500, num_kv_blocks=10, block_size=16)) as api:
        ready = api.receive()
        assert isinstance(ready, Ready)
        assert ready.generation == 7
        assert ready.limits.max_model_len == 160
        assert ready.limits.tier == "scripted"
        api.wait_for_phase(EnginePhase.IDLE)


def test_one_bad_request_is_one_bad_request() -> None:
    with peer(scripted(vocab_size=100, max_model_len=50)) as api:
        api.receive()
        good = request("good", max_tokens=5)
        bad = [
            request("outside", prompt=(100,)),
            request("negative", prompt=(-1,)),
            request("empty", prompt=()),
            request("long", prompt=(1,) * 50),
        ]
        api.send(Add((bad[0], good, *bad[1:])))
        found = api.collect(5)
        for each in bad:
            (output,) = found[each.request_id]
            assert output.finish_reason is FinishReason.ERROR
            assert output.error
        assert found["good"][-1].finish_reason is FinishReason.LENGTH
        api.send(Abort(("good", "never seen")))
        api.send(Add((request("next", max_tokens=1),)))
        assert set(api.collect(1)) == {"next"}


def test_a_hand_over_of_a_sequence_that_had_ended_is_answered_at_once() -> None:
    with peer(scripted()) as api:
        api.receive()
        asked = request("a", max_tokens=2)
        api.send(
            Add((EngineRequest(request_id="a", prompt_token_ids=(1,), params=asked.params, output_token_ids=(4, 5)),))
        )
        (output,) = api.collect(1)["a"]
        assert (output.token_ids, output.finish_reason) == ((), FinishReason.LENGTH)


def test_an_api_process_that_does_not_read_makes_the_engine_wait_not_grow() -> None:
    with peer(scripted(max_num_batched_tokens=4096, num_kv_blocks=100_000)) as api:
        api.receive()
        asked = [request(f"r{n}", prompt=(n,), max_tokens=1000, num_logprobs=20) for n in range(64)]
        api.send(Add(tuple(asked)))
        api.wait_for_phase(EnginePhase.BLOCKED)
        api.send(Abort(tuple(each.request_id for each in asked[1:])))  # is heard while blocked
        found = api.collect(1)
        assert sum(len(output.token_ids) for output in found["r0"]) == 1000
        assert sum(len(output.token_ids) for output in found["r1"]) < 1000
        api.wait_for_phase(EnginePhase.IDLE)
