"""`KVManager`: whole tables or nothing, and sharing of what is computed."""

import pytest

from app.kv.manager import BlockTable, KVManager

TOKENS = list(range(100, 112))  # three blocks of four


def make_manager(num_blocks: int = 8, *, enable_prefix_caching: bool = True) -> KVManager:
    return KVManager(num_blocks, block_size=4, enable_prefix_caching=enable_prefix_caching)


def computed_table(manager: KVManager, token_ids: list[int], *, salt: str = "") -> BlockTable:
    """The table of a sequence that computed all its tokens itself."""
    table = manager.new_table(salt)
    assert manager.admit(table, token_ids, num_matched=0)
    assert manager.cover(table, len(token_ids))
    manager.seal(table, token_ids, num_computed_tokens=len(token_ids))
    return table


def test_admission_reserves_all_known_tokens_and_shows_what_steps_reach() -> None:
    manager = make_manager()
    table = manager.new_table("")
    assert manager.admit(table, TOKENS, num_matched=0)
    assert (manager.pool.num_held, table.view) == (3, ())
    assert manager.cover(table, 5)
    assert (table.view, table.view_tokens, table.announce()) == (tuple(table.block_ids[:2]), 8, 2)
    view = table.view
    assert manager.cover(table, 8)
    assert table.view is view and table.announce() == 0  # rebuilt only when a block is added
    assert manager.cover(table, 13)
    assert (len(table.view), table.announce(), manager.pool.num_held) == (4, 2, 4)


def test_a_refusal_changes_nothing() -> None:
    manager = make_manager(3)
    table = computed_table(manager, TOKENS)
    assert not manager.cover(table, 13)
    other = manager.new_table("")
    assert not manager.admit(other, TOKENS[:4], num_matched=0)
    assert (other.block_ids, len(table.view), manager.pool.num_held) == ([], 3, 3)


def test_only_computed_full_blocks_are_found() -> None:
    manager = make_manager()
    table = manager.new_table("")
    manager.admit(table, TOKENS, num_matched=0)
    reader = manager.new_table("")
    assert manager.match(reader, TOKENS, limit=11).num_blocks == 0
    manager.seal(table, TOKENS, num_computed_tokens=7)
    match = manager.match(reader, TOKENS, limit=11)
    assert (match.num_blocks, match.missing) == (1, manager.next_hash(table, TOKENS))
    manager.seal(table, TOKENS, num_computed_tokens=12)
    assert manager.match(reader, TOKENS, limit=11) == (2, None)
    assert manager.match(reader, TOKENS, limit=12) == (3, None)
    assert manager.match(manager.new_table("tenant"), TOKENS, limit=12).num_blocks == 0


def test_matched_blocks_are_shared_while_held_and_after() -> None:
    manager = make_manager()
    owner = computed_table(manager, TOKENS)
    head = owner.block_ids[:2]
    reader = manager.new_table("")
    assert manager.admit(reader, TOKENS, num_matched=2)
    assert reader.block_ids[:2] == head and manager.pool.num_held == 4
    manager.free(owner)
    manager.free(reader)
    assert manager.pool.num_held == 0
    late = manager.new_table("")
    assert manager.admit(late, TOKENS, num_matched=2)
    assert late.block_ids[:2] == head


def test_admission_does_not_count_the_blocks_that_it_revives_as_free() -> None:
    manager = make_manager(3)
    manager.free(computed_table(manager, TOKENS))
    table = manager.new_table("")
    assert not manager.admit(table, [*TOKENS, 1], num_matched=2)  # four blocks of three
    assert manager.admit(table, TOKENS, num_matched=2)


def test_admitting_what_was_evicted_is_an_error() -> None:
    manager = make_manager(3)
    manager.free(computed_table(manager, TOKENS))
    computed_table(manager, [1] * 12)
    with pytest.raises(ValueError, match="block 0 is not in the prefix cache"):
        manager.admit(manager.new_table(""), TOKENS, num_matched=2)


def test_a_freed_table_is_as_new_but_for_its_hashes() -> None:
    manager = make_manager()
    table = computed_table(manager, TOKENS)
    manager.free(table)
    assert (table.block_ids, table.view, table.view_tokens, table.num_sealed) == ([], (), 0, 0)
    assert manager.admit(table, TOKENS, num_matched=2)
    manager.cover(table, 12)
    assert (table.announce(), table.num_sealed) == (3, 2)


def test_without_prefix_caching_nothing_is_sealed_or_found() -> None:
    manager = make_manager(enable_prefix_caching=False)
    table = manager.new_table("")
    manager.admit(table, TOKENS, num_matched=0)
    assert len(TOKENS) < table.next_seal
    assert manager.next_hash(table, TOKENS) is None
    assert manager.match(manager.new_table(""), TOKENS, limit=11) == (0, None)
