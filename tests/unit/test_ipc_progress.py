"""The progress page: what is written is read, also by another process, and torn writes are not believed."""

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from app.ipc.progress import (
    MAX_REQUEST_KEYS,
    PAGE_BYTES,
    EnginePhase,
    ProgressReader,
    ProgressWriter,
    create_page,
    request_key,
)


@pytest.fixture
def page() -> Iterator[int]:
    fd = create_page()
    yield fd
    os.close(fd)


def test_a_new_page_says_that_nothing_was_written(page: int) -> None:
    progress = ProgressReader(page).read()
    assert progress is not None
    assert progress.phase is EnginePhase.UNBORN


def test_the_running_step_is_read_and_forgotten_after_it(page: int) -> None:
    writer, reader = ProgressWriter(page, generation=3), ProgressReader(page)
    keys = [request_key(f"request-{index}") for index in range(5)]
    writer.begin_step(7, num_tokens=40, request_keys=keys)
    progress = reader.read()
    assert progress is not None
    assert (progress.generation, progress.phase, progress.step_id) == (3, EnginePhase.STEPPING, 7)
    assert (progress.num_tokens, progress.num_requests, progress.request_keys) == (40, 5, tuple(keys))
    writer.set_phase(EnginePhase.IDLE)
    after = reader.read()
    assert after is not None
    assert (after.phase, after.step_id, after.request_keys) == (EnginePhase.IDLE, 7, ())
    assert after.written_ns >= progress.written_ns


def test_who_is_at_work_is_the_step_and_the_grammar_beside_it(page: int) -> None:
    writer, reader = ProgressWriter(page), ProgressReader(page)

    def at_work() -> tuple[int, ...]:
        progress = reader.read()
        assert progress is not None
        return progress.keys_at_work

    writer.begin_step(1, num_tokens=2, request_keys=[5, 6])
    assert at_work() == (5, 6)
    writer.note_preparing(7)
    assert at_work() == (5, 6, 7)
    writer.set_phase(EnginePhase.PREPARING)
    assert at_work() == (7,)
    writer.begin_step(2, num_tokens=0, request_keys=[7])
    assert at_work() == (7,)
    writer.note_preparing(None)
    writer.set_phase(EnginePhase.IDLE)
    assert at_work() == ()


def test_more_requests_than_room_are_counted(page: int) -> None:
    writer, reader = ProgressWriter(page), ProgressReader(page)
    keys = [request_key(str(index)) for index in range(MAX_REQUEST_KEYS + 9)]
    writer.begin_step(1, num_tokens=1, request_keys=keys)
    progress = reader.read()
    assert progress is not None
    assert progress.num_requests == len(keys)
    assert progress.request_keys == tuple(keys[:MAX_REQUEST_KEYS])


def test_a_write_that_did_not_end_and_a_wrong_checksum_are_not_believed(page: int) -> None:
    ProgressWriter(page).set_phase(EnginePhase.IDLE)
    words = memoryview(mmap.mmap(page, PAGE_BYTES)).cast("Q")
    reader = ProgressReader(page)
    words[0] |= 1
    assert reader.read() is None
    words[0] += 1
    assert reader.read() is not None
    words[4] += 1
    assert reader.read() is None


HAMMER = """
import sys
from app.ipc.progress import ProgressWriter
writer = ProgressWriter(int(sys.argv[1]), generation=1)
for step in range(1, 20_000):
    writer.begin_step(step, num_tokens=step, request_keys=[step] * (step % 50))
"""


def test_no_torn_read_while_another_process_writes(page: int) -> None:
    reader = ProgressReader(page)
    child = subprocess.Popen([sys.executable, "-c", HAMMER, str(page)], pass_fds=[page])
    num_read = 0
    while child.poll() is None:
        progress = reader.read()
        if progress is not None and progress.step_id:
            num_read += 1
            assert progress.num_tokens == progress.step_id
            assert progress.request_keys == (progress.step_id,) * (progress.step_id % 50)
    assert child.returncode == 0
    assert num_read > 10
