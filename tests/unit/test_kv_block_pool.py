"""`BlockPool`: what is free, what is shared, what is evicted first."""

import pytest

from app.kv.block_pool import BlockPool


def name(index: int) -> bytes:
    return index.to_bytes(4, "little")


def sealed_and_free(pool: BlockPool, indexes: range) -> list[int]:
    """Seal one block for each index under its name, then give them all back in that order."""
    block_ids = pool.take(len(indexes))
    for block_id, index in zip(block_ids, indexes, strict=True):
        pool.seal(block_id, name(index))
    for block_id in block_ids:
        pool.release([block_id])
    return block_ids


def test_every_block_is_handed_out_once() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take(5)) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_held) == (0, 5)


def test_taking_more_than_is_free_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.take(2)
    with pytest.raises(ValueError, match="2 KV blocks asked for and 1 free"):
        pool.take(2)
    assert pool.num_free == 1


def test_a_block_is_free_once_its_last_holder_gives_it_up() -> None:
    pool = BlockPool(2)
    (block_id,) = pool.take(1)
    pool.seal(block_id, name(1))
    pool.retain(block_id)
    assert (pool.num_shared, pool.num_cached) == (1, 0)
    pool.release([block_id])
    assert (pool.ref_count(block_id), pool.num_free) == (1, 1)
    pool.release([block_id])
    assert (pool.ref_count(block_id), pool.num_free) == (0, 2)
    assert (pool.num_shared, pool.num_cached) == (0, 1)


def test_a_free_sealed_block_is_found_and_revived() -> None:
    pool = BlockPool(4)
    (block_id,) = sealed_and_free(pool, range(1))
    assert pool.find(name(0)) == block_id
    pool.retain(block_id)
    assert block_id not in pool.take(3)
    assert pool.find(name(0)) == block_id


def test_blank_blocks_go_first_then_the_least_recently_used() -> None:
    pool = BlockPool(4)
    first, second, third = sealed_and_free(pool, range(3))
    pool.retain(first)
    pool.release([first])  # used again: now the last to go
    (blank,) = pool.take(1)
    assert blank not in (first, second, third)
    assert pool.take(1) == [second]
    assert [pool.find(name(index)) for index in range(3)] == [first, None, third]
    assert pool.take(2) == [third, first]
    assert pool.hash_of(first) is None


def test_the_tail_of_a_table_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    table = pool.take(3)
    for index, block_id in enumerate(table):
        pool.seal(block_id, name(index))
    pool.release(table)
    assert pool.take(3) == table[::-1]


def test_equal_contents_are_sealed_once() -> None:
    pool = BlockPool(2)
    older, younger = pool.take(2)
    pool.seal(older, name(7))
    pool.seal(younger, name(7))
    assert (pool.find(name(7)), pool.hash_of(younger)) == (older, None)
    pool.release([younger])
    assert pool.take(1) == [younger]  # blank again: nothing to evict
    assert pool.find(name(7)) == older
