"""Block hashes name the salt and every token before the end of the block."""

from app.kv.prefix import HashChain, block_hash, root_hash

TOKENS = list(range(100, 116))


def hashes(token_ids: list[int], *, salt: str = "") -> list[bytes]:
    chain = HashChain(4, salt=salt)
    return [chain.at(index, token_ids) for index in range(len(token_ids) // 4)]


def test_equal_prefixes_have_equal_hashes_and_no_two_blocks_share_one() -> None:
    assert hashes(TOKENS) == hashes([*TOKENS, 1, 2, 3])
    assert len(set(hashes([7] * 40))) == 10


def test_a_change_changes_every_hash_from_its_block_on() -> None:
    changed = [*TOKENS[:5], 0, *TOKENS[6:]]
    same = [one == other for one, other in zip(hashes(TOKENS), hashes(changed), strict=True)]
    assert same == [True, False, False, False]


def test_salts_share_nothing() -> None:
    assert not set(hashes(TOKENS)) & set(hashes(TOKENS, salt="tenant"))
    assert not set(hashes(TOKENS, salt="tenant-1")) & set(hashes(TOKENS, salt="tenant-2"))
    assert root_hash("\ud800") != root_hash("")  # a salt that is no valid text is still a salt


def test_tokens_are_packed_so_that_no_two_lists_meet() -> None:
    root = root_hash("")
    assert block_hash(root, [1, 0x100]) != block_hash(root, [0x1_0000, 1])
    assert block_hash(root, [0]) != block_hash(root, [0, 0])
    assert len(block_hash(root, [2**32 - 1])) == 32


def test_the_chain_follows_a_list_that_grows() -> None:
    chain = HashChain(4, salt="")
    token_ids = TOKENS[:4]
    first = chain.at(0, token_ids)
    token_ids += TOKENS[4:]
    assert chain.at(3, token_ids) == hashes(TOKENS)[3]
    assert chain.at(0, token_ids) == first
