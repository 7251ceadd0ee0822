"""An engine that keeps no promise: a real process that speaks the protocol and breaks it as HEADWATER_FAKE says."""

import argparse
import os
import socket
import struct
import sys
import time

from app.core.types import EngineLimits, EngineOutput, StepStats
from app.ipc.messages import Abort, Add, FromEngine, Ready, Start, StepOutputs
from app.ipc.progress import EnginePhase, ProgressWriter
from app.ipc.transport import EngineEnd

LIMITS = EngineLimits(
    max_model_len=1000,
    vocab_size=1000,
    eos_token_ids=(),
    num_kv_blocks=10,
    block_size=16,
    kv_bytes=0,
    weight_bytes=0,
    max_num_seqs=4,
    max_num_batched_tokens=100,
    device="cpu",
    dtype="none",
    tier="fake",
    tier_reason="a test",
    row_independent=True,
    fingerprint="fake",
    load_seconds=0.0,
)


def step(generation: int, seq: int, request_id: str, token_id: int) -> StepOutputs:
    stats = StepStats(seq, 0.001, 0, 1, 1, 0, 1, 10, 0, 0, 0)
    return StepOutputs(generation, seq, (EngineOutput(request_id, (token_id,)),), stats)


def messages(how: str, generation: int, request_id: str) -> list[FromEngine]:
    """The first token is right in every case."""
    first = step(generation, 1, request_id, 1)
    match how:
        case "gap":
            return [first, step(generation, 3, request_id, 2)]
        case "repeat":
            return [first, first]
        case "future":
            return [first, step(generation + 1, 2, request_id, 2)]
        case "late":
            return [step(generation - 1, 9, request_id, 666), first, step(generation - 1, 2, request_id, 666)]
        case "ready_twice":
            return [first, Ready(generation, 2, LIMITS)]
        case _:
            return [first]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket-fd", type=int)
    parser.add_argument("--progress-fd", type=int)
    options, _ = parser.parse_known_args()
    how = os.environ["HEADWATER_FAKE"]
    sock = socket.socket(fileno=options.socket_fd)
    channel = EngineEnd(sock)
    channel.watch_for_close(lambda: os._exit(0))
    progress = ProgressWriter(options.progress_fd)
    start = channel.receive(None)[0]
    assert isinstance(start, Start)
    if how == "early":
        channel.send(step(start.generation, 0, "x", 1))
    channel.send(Ready(start.generation, 0, LIMITS))
    progress.set_phase(EnginePhase.IDLE)
    while True:
        for message in channel.receive(None):
            if isinstance(message, Abort) or how == "deaf":
                continue
            assert isinstance(message, Add)
            for each in messages(how, start.generation, message.requests[0].request_id):
                channel.send(each)
            if how == "garbage":
                sock.send(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
            if how == "half":
                sock.send(struct.pack("<I", 300) + b"\x00")
                sys.exit(0)
            if how == "closes":
                sock.shutdown(socket.SHUT_RDWR)
                time.sleep(3600)


if __name__ == "__main__":
    main()
