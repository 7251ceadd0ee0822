"""The draws in C against those of `app.runner.sampling`, which defines them: equal for every row, on every level."""

import math
from collections.abc import Iterator, Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.core.plan import RowStart
from app.core.types import SamplingParams
from app.runner.native.build import find_or_build
from app.runner.native.draws import RowDraw, draw_rows
from app.runner.native.levels import choose_level
from app.runner.native.library import Library
from app.runner.sampling import RowError, RowSampler
from app.runner.sampling.weights import weights_of
from tests.native_models import levels_here
from tests.unit.sampling_cases import EOS, NUM_DRAWS, Case, load_cases

Logits = NDArray[np.float32]
Mask = NDArray[np.int32]
VOCABULARIES = (1, 3, 31, 65, 257, 1003, 50_257)


class Drawer:
    """Draws in C from rows that lie as the runner lays them."""

    def __init__(self, level: str) -> None:
        self._library = Library(find_or_build(choose_level(forced=level)))
        self._contexts = {count: self._library.open(count) for count in (1, 2)}

    def draw(
        self, rows: Sequence[RowSampler], logits: Sequence[Logits], position: int,
        masks: Sequence[Mask | None] | None = None, *, num_threads: int = 1, draws: Sequence[RowDraw] | None = None,
    ) -> list[int | None]:  # fmt: skip
        vocab_size = len(logits[0])
        stored = np.full((len(rows), -(-vocab_size // 64) * 64), np.float32(9e9))  # what lies behind never wins
        stored[:, :vocab_size] = logits
        draws = [RowDraw(row) for row in rows] if draws is None else draws
        masks = [None] * len(rows) if masks is None else masks
        for draw, row, mask in zip(draws, stored, masks, strict=True):
            best_id = int(row[:vocab_size].argmax())
            draw.aim(row.ctypes.data, position, best_id=best_id, mask=mask)
        draw_rows(self._library, self._contexts[num_threads], vocab_size, draws)
        return [draw.token_id for draw in draws]

    def weights_of(self, scores: Logits) -> Logits:
        weights = np.empty_like(scores)
        function = self._library.function("hw_weights", None, c_void_p, c_int64, c_void_p)
        function(scores.ctypes.data, len(scores), weights.ctypes.data)
        return weights

    def close(self) -> None:
        for context in self._contexts.values():
            self._library.close(context)


@pytest.fixture(scope="module", params=levels_here())
def drawer(request: pytest.FixtureRequest) -> Iterator[Drawer]:
    made = Drawer(request.param)
    yield made
    made.close()


def random_logits(rng: np.random.Generator, vocab_size: int) -> Logits:
    """Peaked, flat, full of ties, or all alike."""
    scale = float(rng.choice([0.0, 0.01, 1.0, 4.0, 20.0]))
    logits = (rng.standard_normal(vocab_size) * scale).astype(np.float32)
    return np.round(logits * 4) / np.float32(4) if rng.random() < 0.4 else logits


def random_params(rng: np.random.Generator, vocab_size: int) -> SamplingParams:
    def maybe(low: float, high: float, off: float, chance: float = 0.4) -> float:
        return float(rng.uniform(low, high)) if rng.random() < chance else off

    def ids(most: int) -> list[int]:
        return rng.integers(0, vocab_size, int(rng.integers(1, most))).tolist()

    return SamplingParams(
        seed=int(rng.integers(2**63)) * 2 + 1,
        max_tokens=99,
        min_tokens=int(rng.integers(3)) * int(rng.random() < 0.3),
        temperature=maybe(0.05, 3.0, float(rng.choice([0.0, 1.0, 50.0])), 0.6),
        top_p=maybe(0.0, 1.0, float(rng.choice([1.0, 1.0, 0.95, 1e-9, 0.999999]))),
        top_k=int(rng.integers(1, max(2, int(vocab_size * rng.choice([0.01, 1.2]))))) if rng.random() < 0.5 else 0,
        min_p=maybe(0.0, 1.0, 0.0, 0.3),
        presence_penalty=maybe(-2, 2, 0.0),
        frequency_penalty=maybe(-2, 2, 0.0),
        repetition_penalty=maybe(0.5, 2.0, 1.0),
        logit_bias=tuple((i, float(rng.uniform(-100, 100))) for i in set(ids(30))) if rng.random() < 0.3 else (),
        allowed_token_ids=tuple(ids(60)) if rng.random() < 0.2 else (),
        bad_words=tuple((i,) for i in ids(4)) if rng.random() < 0.2 else (),
    )


def random_mask(rng: np.random.Generator, vocab_size: int) -> Mask | None:
    """Nothing, most, a few, or one; bits beyond the vocabulary are set."""
    density = float(rng.choice([-1.0, -1.0, 0.7, 0.01, 0.0]))
    if density < 0:
        return None
    flags = np.ones(-(-vocab_size // 32) * 32 + 64, dtype=bool)
    flags[:vocab_size] = rng.random(vocab_size) < density
    flags[rng.integers(vocab_size)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def defined(row: RowSampler, logits: Logits, position: int, mask: Mask | None) -> int | None:
    try:
        return row.sample_row(logits, position, mask=mask)[0]
    except RowError:
        return None


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_random_rows_draw_what_the_definition_draws(drawer: Drawer, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    num_rows, num_steps = (40 if vocab_size > 10_000 else 150), 3
    starts = [
        RowStart(
            str(index), random_params(rng, vocab_size), tuple(rng.integers(0, vocab_size, 9).tolist()),
            tuple(rng.integers(0, vocab_size, int(rng.integers(4))).tolist()),
        )
        for index in range(num_rows)
    ]  # fmt: skip
    rows, followed = ([RowSampler(start, vocab_size, (0,)) for start in starts] for _ in range(2))
    draws = [RowDraw(row) for row in followed]
    for step in range(num_steps):
        logits = [random_logits(rng, vocab_size) for _ in rows]
        masks = [random_mask(rng, vocab_size) for _ in rows]
        position = 2**33 * step + step
        got = drawer.draw(followed, logits, position, masks, draws=draws)
        together = drawer.draw(followed, logits, position, masks, num_threads=2)
        expected = [defined(*each) for each in zip(rows, logits, [position] * num_rows, masks, strict=True)]
        different = [index for index in range(num_rows) if got[index] != expected[index]]
        assert not different, [(starts[index].params, got[index], expected[index]) for index in different[:3]]
        assert together == got
        for row, token_id in zip(followed, got, strict=True):
            if token_id is not None:
                row.observe(token_id)


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)
def test_cases_draw_the_committed_tokens(drawer: Drawer, case: Case) -> None:
    row = RowSampler(case.start(), case.vocab_size, EOS)
    drawn = []
    for step in range(NUM_DRAWS):
        (token_id,) = drawer.draw([row], [case.logits()], len(case.prompt) + len(case.output) + step)
        assert token_id is not None
        row.observe(token_id)
        drawn.append(token_id)
    assert tuple(drawn) == case.expected


def test_many_tokens_are_counted_while_their_arrays_grow(drawer: Drawer) -> None:
    """More distinct tokens than the counts have room for at first."""
    params = SamplingParams(seed=1, max_tokens=999, temperature=0.0, repetition_penalty=1.5, frequency_penalty=9.0)
    row, followed = (RowSampler(RowStart("r", params, (1, 2), ()), 300, (0,)) for _ in range(2))
    draw, logits = RowDraw(followed), np.linspace(3.0, 2.0, 300, dtype=np.float32)
    drawn = []
    for position in range(280):
        (token_id,) = drawer.draw([followed], [logits], position, draws=[draw])
        assert token_id == row.sample_row(logits, position)[0]
        followed.observe(token_id)
        drawn.append(token_id)
    assert len(set(drawn)) > 250


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 2}], ids=str)
def test_nothing_is_drawn_where_nothing_is_left(drawer: Drawer, fields: dict[str, Any]) -> None:
    params = SamplingParams(seed=1, max_tokens=9, allowed_token_ids=(4, 70), bad_words=((70,),), **fields)
    row = RowSampler(RowStart("r", params, (1,), ()), 100, (0,))
    mask = np.full(4, ~np.int32(1 << 4), dtype=np.int32)
    logits = np.arange(100, dtype=np.float32)
    assert drawer.draw([row, row], [logits, logits], 3, [None, mask]) == [4, None]


def test_weights_are_the_definition_s_to_the_last_bit(drawer: Drawer) -> None:
    scores = np.linspace(-40.0, 0.0, 160_000, dtype=np.float32)
    scores[:3] = -np.inf, -1e30, -0.0
    assert drawer.weights_of(scores).tobytes() == weights_of(scores).tobytes()


def test_weights_add_up_exactly() -> None:
    """Multiples of 2**-32 up to 1: what makes a sum the same in every order."""
    scores = -np.abs(np.random.default_rng(0).standard_normal(50_000) * 9).astype(np.float32)
    scores[:4] = 0.0, -np.inf, -22.0, -23.0
    weights = weights_of(scores)
    assert weights[0] == 1.0 and weights[1] == 0.0 and weights.max() == 1.0
    assert np.array_equal(weights.astype(np.float64) * 2**32 % 1.0, np.zeros(len(weights)))
    assert weights == pytest.approx(np.exp(scores.astype(np.float64)), abs=2e-7)
    total = math.fsum(weights.tolist())
    for order in (weights, weights[::-1], np.sort(weights)):
        assert float(order.astype(np.float64).cumsum()[-1]) == total
