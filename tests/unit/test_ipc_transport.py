"""Frames over a real socket pair: whole, split, too long, broken, closed, and a reader that does not read."""

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from app.core.types import EngineOutput, EngineRequest, SamplingParams, StepStats
from app.ipc.api_end import ApiEnd
from app.ipc.messages import Abort, Add, FromEngine, StepOutputs
from app.ipc.transport import MAX_FRAME_BYTES, EngineEnd, FrameBuffer, FrameError, encode_frame

STATS = StepStats(1, 0.1, 0, 1, 1, 0, 1, 8, 0, 0, 0)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def add(length: int = 3) -> Add:
    request = EngineRequest(
        request_id="a", prompt_token_ids=tuple(range(length)), params=SamplingParams(seed=2**64 - 1, max_tokens=4)
    )
    return Add((request,))


def step(seq: int, *, num_tokens: int = 1) -> StepOutputs:
    return StepOutputs(1, seq, (EngineOutput("a", tuple(range(num_tokens))),), STATS)


def test_frames_survive_any_split() -> None:
    stream = b"".join(encode_frame(message) for message in (add(), Abort(("a", "b")), add(1000)))
    for size in (1, 2, 3, 7, 1000, len(stream)):
        buffer = FrameBuffer()
        bodies = [body for at in range(0, len(stream), size) for body in buffer.feed(stream[at : at + size])]
        assert b"".join(struct.pack("<I", len(body)) + body for body in bodies) == stream


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(FrameError, match=str(length)):
        list(FrameBuffer().feed(struct.pack("<I", length)))


def test_engine_end_receives_what_was_sent_and_notices_the_close(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    engine = EngineEnd(theirs)
    assert engine.receive() == []
    ours.sendall(encode_frame(add()) + encode_frame(Abort(("a",)))[:5])
    assert engine.receive(None) == [add()]
    ours.sendall(encode_frame(Abort(("a",)))[5:])
    assert engine.receive(None) == [Abort(("a",))]
    ours.close()
    with pytest.raises(ConnectionError):
        engine.receive(None)


def test_descriptors_come_beside_a_frame_and_stay_open(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    engine = EngineEnd(theirs)
    memory = os.memfd_create("test")
    socket.send_fds(ours, [encode_frame(add())], [memory, memory])
    os.write(memory, b"same")
    os.close(memory)
    assert engine.receive(None) == [add()]
    descriptors = engine.take_descriptors()
    assert [os.pread(descriptor, 4, 0) for descriptor in descriptors] == [b"same"] * 2
    assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
    assert engine.take_descriptors() == []
    for descriptor in descriptors:
        os.close(descriptor)


def test_engine_end_refuses_what_is_no_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    body = msgspec.msgpack.encode({"type": "dance"})
    ours.sendall(struct.pack("<I", len(body)) + body)
    with pytest.raises(FrameError, match="no message to an engine"):
        EngineEnd(theirs).receive(None)


def test_a_wake_ends_a_wait_without_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    engine = EngineEnd(pair[1])
    waker = threading.Thread(target=engine.wake)
    waker.start()
    assert engine.receive(None) == []  # would wait for ever
    waker.join()
    engine.wake()
    engine.wake()
    assert engine.receive(60.0) == []  # a wake that came before the wait counts too
    pair[0].sendall(encode_frame(add()))
    assert engine.receive(60.0) == [add()]


def test_sending_never_blocks_and_the_backlog_drains_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    engine = EngineEnd(theirs)
    messages = [step(seq, num_tokens=10_000) for seq in range(50)]
    for message in messages:
        engine.send(message)
    assert engine.backlog_bytes > 100_000

    async def read() -> list[FromEngine | None]:
        end = await ApiEnd.open(ours)
        received = [await end.receive() for _ in messages]
        end.close()
        return received

    reader = threading.Thread(target=engine.flush, kwargs={"timeout": 30.0})
    reader.start()
    assert asyncio.run(read()) == messages
    reader.join()
    assert engine.backlog_bytes == 0


def test_the_watcher_tells_of_the_close_while_the_owner_is_busy(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    closed = threading.Event()
    EngineEnd(theirs).watch_for_close(closed.set)
    ours.sendall(encode_frame(add()))
    assert not closed.is_set()
    ours.close()
    assert closed.wait(10)


async def test_api_end_reads_messages_then_none(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    end = await ApiEnd.open(ours)
    theirs.sendall(encode_frame(step(1)) + encode_frame(step(2))[:9])
    assert await end.receive() == step(1)
    theirs.close()
    assert await end.receive() is None
    end.send(add())
    end.close()
    end.send(add())


async def test_api_end_refuses_what_is_no_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    end = await ApiEnd.open(ours)
    theirs.sendall(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
    with pytest.raises(FrameError, match="no message of an engine"):
        await end.receive()
    end.close()
