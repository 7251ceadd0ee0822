"""The engine at its socket, without a client: Ready, numbering, backlog, requests that cannot run."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from app.client.process import EngineProcess
from app.core.config import EngineConfig
from app.core.types import EngineOutput, EngineRequest, FinishReason
from app.grammar import source
from app.ipc.messages import Abort, Add, FromEngine, Ready, StepOutputs, ToEngine
from app.ipc.progress import EnginePhase, Progress, request_key
from app.ipc.transport import FrameBuffer, encode_frame
from tests.process.engines import WAIT_SECONDS, request, scripted
from tests.text_tokenizers import byte_level


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

    def wait_for(self, condition: Callable[[Progress], bool]) -> Progress:
        """The first page seen that meets it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (progress := self.process.progress.read()) is None or not condition(progress):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return progress

    def wait_for_phase(self, phase: EnginePhase) -> None:
        self.wait_for(lambda progress: progress.phase is phase)

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


NUM_TRIAL_STEPS = 5
"""Of a suspect with five blocks of prompt: so many lone steps to its first token."""


def suspect_and_constrained(folder: Path) -> tuple[EngineConfig, EngineRequest, EngineRequest]:
    """The vocabulary is a FIFO: whoever prepares a grammar is seen waiting for it."""
    os.mkfifo(folder / "tokenizer.json")
    config = scripted(
        vocab_size=byte_level().vocab_size,
        step_seconds=0.05,
        max_num_batched_tokens=16,
        block_size=16,
        max_model_len=512,
    )
    config = msgspec.structs.replace(config, model_dir=str(folder))
    suspect = request("suspect", prompt=tuple(range(80)), max_tokens=3)
    plain = request("constrained", max_tokens=20)
    params = msgspec.structs.replace(plain.params, grammar=source.regex("[a-c]{5}"))
    return (
        config,
        msgspec.structs.replace(suspect, is_on_probation=True),
        msgspec.structs.replace(plain, params=params),
    )


def test_no_grammar_is_prepared_beside_a_trial(tmp_path: Path) -> None:
    config, suspect, constrained = suspect_and_constrained(tmp_path)
    with peer(config) as api:
        api.receive()
        api.send(Add((suspect, constrained)))
        page = api.wait_for(lambda progress: progress.preparing_key is not None)
        assert page.preparing_key == request_key("constrained") and page.step_id >= NUM_TRIAL_STEPS
        (tmp_path / "tokenizer.json").write_bytes(byte_level()._library.to_str().encode())
        found = api.collect(2)
    assert len(found["suspect"][-1].token_ids) > 0
    assert byte_level().decode([i for output in found["constrained"] for i in output.token_ids]) == "aaaaa"


def test_one_that_waits_for_a_trial_and_is_aborted_is_never_prepared(tmp_path: Path) -> None:
    config, suspect, constrained = suspect_and_constrained(tmp_path)
    with peer(config) as api:
        api.receive()
        api.send(Add((suspect, constrained)))
        api.send(Abort((constrained.request_id,)))
        api.collect(1)
        page = api.wait_for(lambda progress: progress.phase is EnginePhase.IDLE)
        assert page.preparing_key is None
        with pytest.raises(OSError, match="No such device"):  # nobody reads it
            os.open(tmp_path / "tokenizer.json", os.O_WRONLY | os.O_NONBLOCK)
