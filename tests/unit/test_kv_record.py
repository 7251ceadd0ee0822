"""`BlockRecord`: true at every instant, and nothing is believed that was not written whole."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.kv.block_pool import BlockPool
from app.kv.record import KEY_BYTES, BlockRecord, size_of

NUM_BLOCKS = 6
KEY = b"k" * KEY_BYTES
OTHER_KEY = b"o" * KEY_BYTES

Write = tuple[str, int, int]
WRITES = st.lists(
    st.tuples(
        st.sampled_from(["seal", "forget", "let_go", "hold"]),
        st.integers(0, NUM_BLOCKS - 1),
        st.integers(0, 200),
    ),
    max_size=25,
)


def name(index: int) -> bytes:
    return index.to_bytes(32, "big")


def write(record: BlockRecord, writes: list[Write]) -> dict[int, bytes]:
    """Do them; returns what must then stand there."""
    sealed: dict[int, bytes] = {}
    for action, block_id, index in writes:
        if action == "seal":
            if block_id in sealed or name(index) in sealed.values():
                continue
            sealed[block_id] = name(index)
            record.seal(block_id, name(index))
        elif action == "forget":
            sealed.pop(block_id, None)
            record.forget(block_id)
        elif block_id in sealed:
            record.let_go(block_id) if action == "let_go" else record.hold(block_id)
    return sealed


def reopened(content: bytes | bytearray, *, key: bytes = KEY) -> list[tuple[int, bytes]]:
    return BlockRecord(bytearray(content), NUM_BLOCKS, key=key).entries()


@given(WRITES)
def test_the_next_engine_reads_what_was_written(writes: list[Write]) -> None:
    memory = bytearray(size_of(NUM_BLOCKS))
    sealed = write(BlockRecord(memory, NUM_BLOCKS, key=KEY), writes)
    assert dict(reopened(memory)) == sealed
    assert reopened(memory, key=OTHER_KEY) == [], "blocks of another model were taken over"


@given(WRITES, st.data())
@settings(max_examples=300)
def test_what_is_cut_off_or_overwritten_counts_for_nothing(writes: list[Write], data: st.DataObject) -> None:
    memory = bytearray(size_of(NUM_BLOCKS))
    sealed = write(BlockRecord(memory, NUM_BLOCKS, key=KEY), writes)
    begin = data.draw(st.integers(0, len(memory)))
    end = data.draw(st.integers(begin, len(memory)))
    filler = data.draw(st.sampled_from([b"\x00", b"\xff", b"\xa5"]))
    memory[begin:end] = filler * (end - begin)
    assert set(reopened(memory)) <= set(sealed.items())


def test_a_kill_between_any_two_lines_leaves_only_true_entries() -> None:
    """Whatever the record does, the memory is looked at line by line, as the next engine would see it."""
    memory = bytearray(size_of(NUM_BLOCKS))
    pool = BlockPool(NUM_BLOCKS, record=BlockRecord(memory, NUM_BLOCKS, key=KEY))
    contents: dict[int, bytes] = {}
    for round_number in range(4):
        with looking_at(memory) as seen:
            block_ids = pool.take(NUM_BLOCKS)
        _check(seen, contents)
        assert reopened(memory) == [], "a block that may be written has an entry"
        for block_id in block_ids:
            contents[block_id] = name(100 * round_number + block_id)
            with looking_at(memory) as seen:
                pool.seal(block_id, contents[block_id])
            _check(seen, contents)
        with looking_at(memory) as seen:
            pool.release(block_ids)
        _check(seen, contents)
        assert dict(reopened(memory)) == contents


@contextmanager
def looking_at(memory: bytearray) -> Iterator[list[bytes]]:
    """Copies of the memory before each line that runs in the record."""
    seen: list[bytes] = []

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith("record.py"):
            return None
        seen.append(bytes(memory))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


def _check(seen: list[bytes], contents: dict[int, bytes]) -> None:
    """All that was seen is what the blocks hold by now."""
    for memory in seen:
        assert set(reopened(memory)) <= set(contents.items())


def test_blocks_in_use_are_evicted_last() -> None:
    memory = bytearray(size_of(NUM_BLOCKS))
    pool = BlockPool(NUM_BLOCKS, record=BlockRecord(memory, NUM_BLOCKS, key=KEY))
    block_ids = pool.take(4)
    for block_id in block_ids:
        pool.seal(block_id, name(block_id))
    pool.release([block_ids[2]])
    pool.release([block_ids[0]])
    pool.release([block_ids[3]])
    pool.retain(block_ids[2])

    record = BlockRecord(memory, NUM_BLOCKS, key=KEY)
    assert [block_id for block_id, _ in record.entries()] == [block_ids[0], block_ids[3], block_ids[1], block_ids[2]]
    again = BlockPool(NUM_BLOCKS, record=record)
    assert (again.num_adopted, again.num_cached, again.num_held) == (4, 4, 0)
    assert again.take(4)[2:] == [block_ids[0], block_ids[3]]
    assert again.find(name(block_ids[1])) == block_ids[1]
    again.release([block_ids[0]])
    assert record._last_stamp > 0


def test_a_hash_that_stands_twice_names_one_block() -> None:
    memory = bytearray(size_of(NUM_BLOCKS))
    record = BlockRecord(memory, NUM_BLOCKS, key=KEY)
    record.seal(4, name(1))
    record.seal(2, name(1))
    assert reopened(memory) == [(2, name(1))]
    assert BlockRecord(memory, NUM_BLOCKS, key=KEY).entries() == [(2, name(1))]
    record.forget(2)
    assert reopened(memory) == [], "the other one may have been written over"


def test_it_lies_in_a_memfd() -> None:
    descriptor = os.memfd_create("test")
    try:
        BlockRecord.open(descriptor, NUM_BLOCKS, key=KEY).seal(3, name(9))
        assert BlockRecord.open(descriptor, NUM_BLOCKS, key=KEY).entries() == [(3, name(9))]
        assert BlockRecord.open(descriptor, 2 * NUM_BLOCKS, key=KEY).entries() == [], "another pool"
    finally:
        os.close(descriptor)


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="6 blocks need 352 bytes"):
        BlockRecord(bytearray(351), NUM_BLOCKS, key=KEY)
