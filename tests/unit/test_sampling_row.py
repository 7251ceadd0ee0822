"""A row's sampler: state from ids alone, logprobs, errors that stay in the row."""

from typing import Any

import numpy as np
import pytest

from app.core.plan import RowStart
from app.core.types import SamplingParams
from app.runner.sampling import RowError, RowSampler, score_prompt

VOCAB = 50


def sampler(
    *, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), eos: tuple[int, ...] = (0,), **fields: Any
) -> RowSampler:
    params = SamplingParams(**({"seed": 11, "max_tokens": 99} | fields))
    return RowSampler(RowStart("r", params, prompt, output), VOCAB, eos)


def logits(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)


def test_a_row_resumed_from_ids_draws_what_the_uninterrupted_row_draws() -> None:
    fields: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.9,
        "bad_words": ((4, 5), (6,)),
        "min_tokens": 12,
        "temperature": 0.9,
    }
    whole = sampler(**fields)
    drawn = [whole.sample_row(logits(i), 3 + i)[0] for i in range(20)]
    for cut in (1, 7, 19):
        resumed = sampler(output=tuple(drawn[:cut]), **fields)
        assert [resumed.sample_row(logits(i), 3 + i)[0] for i in range(cut, 20)] == drawn[cut:]


def test_logits_are_not_written() -> None:
    given = logits()
    before = given.copy()
    sampler(repetition_penalty=2.0, logit_bias=((3, 5.0),), allowed_token_ids=(3, 4)).sample_row(given, 3)
    assert np.array_equal(given, before)


def test_penalties_by_hand() -> None:
    row = sampler(prompt=(1, 1), output=(2, 2, 3), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    given = np.zeros(VOCAB, dtype=np.float32)
    given[[1, 2, 3, 4]] = [4.0, -1.0, 4.0, 4.0]
    changed = row.changes().apply(given)
    assert changed[:5].tolist() == [0.0, 2.0, -2.0 - 0.5 - 0.5, 2.0 - 0.5 - 0.25, 4.0]


def test_min_tokens_counts_output_handed_over() -> None:
    given = np.zeros(VOCAB, dtype=np.float32)
    given[0] = 9.0
    assert sampler(min_tokens=2, output=(7,), temperature=0.0).sample_row(given, 4)[0] == 1
    assert sampler(min_tokens=2, output=(7, 7), temperature=0.0).sample_row(given, 5)[0] == 0
    assert sampler(min_tokens=2, temperature=0.0, stop_token_ids=(1,)).sample_row(given, 3)[0] == 2


def test_eos_outside_the_vocabulary_is_no_error() -> None:
    assert sampler(min_tokens=2, eos=(0, 99999)).sample_row(logits(), 3)[0] >= 1


def test_greedy_ties_go_to_the_lowest_id() -> None:
    given = np.zeros(VOCAB, dtype=np.float32)
    given[[9, 4, 30]] = 1.0
    assert sampler(temperature=0.0).sample_row(given, 3)[0] == 4


def test_logprobs_are_of_the_raw_logits() -> None:
    given = logits()
    given[[7, 8]] = 5.0
    token_id, scored = sampler(temperature=0.0, num_logprobs=3, logit_bias=((7, -100.0),)).sample_row(given, 3)
    assert token_id == 8
    assert scored is not None
    exact = given.astype(np.float64) - np.log(np.exp(given.astype(np.float64)).sum())
    assert scored.top_token_ids[:2] == (7, 8)
    assert scored.rank == 1
    assert scored.logprob == scored.top_logprobs[0] == scored.top_logprobs[1]
    assert scored.top_logprobs == pytest.approx(exact[list(scored.top_token_ids)], abs=1e-5)


def test_logprobs_of_zero_top_and_of_impossible_tokens() -> None:
    given = np.full(VOCAB, -np.inf, dtype=np.float32)
    given[5] = 0.0
    _, scored = sampler(num_logprobs=0).sample_row(given, 3)
    assert scored is not None
    assert (scored.logprob, scored.rank, scored.top_token_ids) == (0.0, 1, ())
    (prompt,) = score_prompt(given[None], [6], 2)
    assert (prompt.logprob, prompt.rank) == (-9999.0, 2)
    assert prompt.top_token_ids == (5, 0)


def test_score_prompt_scores_each_next_token() -> None:
    rows = np.stack([logits(1), logits(2)])
    scored = score_prompt(rows, [3, 4], 5)
    for row, token_id, one in zip(rows, [3, 4], scored, strict=True):
        exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
        assert one.logprob == pytest.approx(exact[token_id], abs=1e-5)
        assert one.rank == 1 + int((row > row[token_id]).sum())
        assert len(one.top_token_ids) == 5
    with pytest.raises(ValueError, match="one row a token"):
        score_prompt(rows, [3], 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_the_row(bad: float) -> None:
    given = logits()
    given[20] = bad
    for fields in ({}, {"temperature": 0.0}, {"allowed_token_ids": (1,)}):
        with pytest.raises(RowError, match="not finite"):
            sampler(**fields).sample_row(given, 3)
    with pytest.raises(RowError, match="not finite"):
        score_prompt(given[None], [1], 0)


def test_nothing_left_to_draw_fails_the_row() -> None:
    for temperature in (0.0, 1.0):
        row = sampler(temperature=temperature, allowed_token_ids=(0, 4), bad_words=((4,),), min_tokens=3)
        with pytest.raises(RowError, match="no token to draw") as left:
            row.sample_row(logits(), 3)
        assert left.value.is_request_fault


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": ((VOCAB, 1.0),)},
        {"allowed_token_ids": (3, VOCAB)},
        {"bad_words": ((3, -1),)},
        {"stop_token_ids": (VOCAB,)},
    ],
)
def test_ids_outside_the_vocabulary_fail_the_row_when_it_draws(fields: dict[str, Any]) -> None:
    row = sampler(**fields)
    with pytest.raises(RowError, match=f"{next(iter(fields))} holds a token id outside the vocabulary"):
        row.sample_row(logits(), 3)


def test_many_distinct_tokens_are_counted() -> None:
    row = sampler(prompt=tuple(range(40)), output=tuple(range(40)) * 3, repetition_penalty=2.0, frequency_penalty=1.0)
    for token_id in (*range(30, 50), *range(30, 50)):
        row.observe(token_id)
    changes = row.changes()
    counts = dict(zip(changes.output_ids.tolist(), changes.output_counts.tolist(), strict=True))
    assert counts == {i: 3.0 + 2.0 * (i >= 30) for i in range(40)} | dict.fromkeys(range(40, 50), 2.0)
    assert sorted(changes.repeated_ids.tolist()) == list(range(50))
