"""A row is a row: its logits are equal to the last bit whatever shares the step.

Batch size, the chunks of its prompt, cached blocks, thread count and block ids may change; bits may not.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.core.plan import LogitsNeed
from app.runner.native.runner import NativeRunner
from tests.native_models import OTHER_FAMILIES, SEEDED, Hand, levels_here, load_native, prompt_ids, write_model

LENGTH = 150
PROMPT = prompt_ids(LENGTH)
BLOCKS_A_ROW = 3
SHAPES = {
    "grouped-64": {},
    "grouped-128": {"head_dim": 128, "num_attention_heads": 4},
    "single-64": {"num_key_value_heads": 6, "attention_bias": True},
}
MODES = [(level, quantization) for level in levels_here() for quantization in (None, "int8", "int8-safe", "int4")]
PARAMS = [(shape, *mode) for shape in SHAPES for mode in MODES] + [
    (family, level, None) for family in OTHER_FAMILIES for level in levels_here()
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("native-bits")
    return {name: write_model(base / name, changes) for name, changes in {**SHAPES, **OTHER_FAMILIES}.items()}


@pytest.fixture(params=PARAMS, ids=lambda p: "-".join(map(str, p)))
def runners(
    request: pytest.FixtureRequest, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[NativeRunner, NativeRunner]]:
    """The same model with one thread and with two."""
    shape, level, quantization = request.param
    monkeypatch.setenv("HEADWATER_ISA", level)
    pair = [
        load_native(folders[shape], num_threads=count, num_kv_blocks=256, quantization=quantization) for count in (1, 2)
    ]
    yield pair[0], pair[1]
    for runner in pair:
        runner.close()


def whole(hand: Hand, row: int, first_block: int) -> NDArray[np.float32]:
    """Last logits of PROMPT in one step."""
    return hand.logits(hand.entry(row, PROMPT, blocks_from(first_block)))[-1]


def chunked(hand: Hand, row: int, first_block: int, chunks: Sequence[int]) -> NDArray[np.float32]:
    """Last logits of PROMPT in several steps."""
    start, logits = 0, np.empty(0, dtype=np.float32)
    for count in chunks:
        part = PROMPT[start : start + count]
        logits = hand.logits(hand.entry(row, part, blocks_from(first_block), start=start, prompt=PROMPT))[-1]
        start += count
    assert start == LENGTH
    return logits


def blocks_from(first: int) -> tuple[int, ...]:
    return tuple(range(first, first + BLOCKS_A_ROW))


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def test_chunks_threads_and_blocks_change_no_bit(runners: tuple[NativeRunner, NativeRunner]) -> None:
    one, two = (Hand(runner) for runner in runners)
    expected = whole(one, 0, 0)
    assert np.isfinite(expected).all()
    assert same_bits(whole(two, 0, 9), expected)
    for row, chunks in enumerate(([1, LENGTH - 1], [63, 1, 1, LENGTH - 65], [37] * 4 + [2], [LENGTH - 1, 1]), start=1):
        assert same_bits(chunked(one, row, 3 * row, chunks), expected), chunks
        assert same_bits(chunked(two, row, 3 * row, chunks), expected), chunks


def test_threads_that_come_and_go_change_no_bit(folders: dict[str, Path]) -> None:
    """More threads than cores: some come late to a phase, when others have taken their share."""
    one, many = (load_native(folders["grouped-64"], num_threads=count, quantization="int8") for count in (1, 7))
    expected = whole(Hand(one), 0, 0)
    hand = Hand(many)
    for row in range(12):
        assert same_bits(whole(hand, row, 0), expected)
        assert same_bits(chunked(hand, 20 + row, 3, [LENGTH - 2, 1, 1]), expected)
    one.close()
    many.close()


def test_batch_mates_change_no_bit(runners: tuple[NativeRunner, NativeRunner]) -> None:
    one, two = (Hand(runner) for runner in runners)
    expected = whole(one, 0, 0)
    for hand, size in ((one, 7), (two, 32), (two, 64)):
        fill(hand, size)
        decode = [
            hand.entry(row, last_token(row), blocks_from(3 * row), start=length(row) - 1) for row in range(1, size)
        ]
        mine = hand.entry(200 + size, PROMPT[-1:], blocks_from(3), start=LENGTH - 1, prompt=PROMPT)
        # Row 1 holds PROMPT: its blocks serve as a cached prefix here.
        logits = hand.logits(*decode, mine)
        assert same_bits(logits[-1], expected), size
        assert same_bits(logits[0], expected), size


def fill(hand: Hand, size: int) -> None:
    """Rows 1 .. size - 1 with prompts of different lengths, the KV of all but the last token written."""
    for row in range(1, size):
        if row in hand.started:
            continue
        token_ids = PROMPT if row == 1 else prompt_ids(length(row), seed=row)
        hand.run(hand.entry(row, token_ids[:-1], blocks_from(3 * row), sample=False, logits=LogitsNeed.NONE))


def length(row: int) -> int:
    return LENGTH if row == 1 else 20 + 13 * row % 120


def last_token(row: int) -> tuple[int, ...]:
    return PROMPT[-1:] if row == 1 else prompt_ids(length(row), seed=row)[-1:]


def test_sequences_with_one_beginning_change_no_bit(runners: tuple[NativeRunner, NativeRunner]) -> None:
    """Nine sequences go through blocks that they share; the fifth shares one of two, and all end differently."""
    begin = prompt_ids(128, seed=9)
    prompts = [begin[: 64 if i == 4 else 128] + prompt_ids(3 + 23 * i, seed=100 + i) for i in range(9)]
    alone = Hand(runners[0])
    expected = [alone.logits(alone.entry(i, prompt, range(5 * i, 5 * i + 5)))[0] for i, prompt in enumerate(prompts)]
    for hand in (Hand(runner) for runner in runners):
        tables = [(200, 201, *range(60 + 4 * i, 64 + 4 * i)) for i in range(9)]
        tables[4] = (200, *tables[4][2:])
        hand.run(hand.entry(100, begin, (200, 201), sample=False, logits=LogitsNeed.NONE))
        for row, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
            start = 64 if row == 4 else 128
            rest = hand.entry(
                row, prompt[start:-1], table, start=start, prompt=prompt, sample=False, logits=LogitsNeed.NONE
            )
            hand.run(rest)
        step = [hand.entry(i, p[-1:], tables[i], start=len(p) - 1) for i, p in enumerate(prompts)]
        for got, want in zip(hand.logits(*step), expected, strict=True):
            assert same_bits(got, want)


def test_a_mixed_step_changes_no_bit(runners: tuple[NativeRunner, NativeRunner]) -> None:
    one, two = (Hand(runner) for runner in runners)
    expected = whole(one, 0, 0)
    fill(two, 5)
    others = [two.entry(row, last_token(row), blocks_from(3 * row), start=length(row) - 1) for row in (2, 3, 4)]
    mine = two.entry(50, PROMPT, blocks_from(150))
    prefill = two.entry(51, prompt_ids(77, seed=51), blocks_from(153), params=SEEDED)
    assert same_bits(two.logits(others[0], mine, *others[1:], prefill)[1], expected)


def test_what_another_sequence_left_in_a_block_changes_no_bit(runners: tuple[NativeRunner, NativeRunner]) -> None:
    hand = Hand(runners[1])
    expected = whole(hand, 0, 0)
    expected_odd = hand.logits(hand.entry(3, PROMPT[:-1], blocks_from(0)))[0]  # ends in half a pair of values
    assert np.isfinite(expected_odd).all()
    poison(runners[1])
    assert same_bits(whole(hand, 1, 3), expected)
    assert same_bits(hand.logits(hand.entry(4, PROMPT[:-1], blocks_from(9)))[0], expected_odd)
    assert same_bits(chunked(hand, 2, 6, [LENGTH - 3, 1, 1, 1]), expected)


def poison(runner: NativeRunner) -> None:
    """Fill the KV pool with NaN: slots that no token of a sequence filled must never be multiplied."""
    runner.model.kv[:] = 0x7FC0
