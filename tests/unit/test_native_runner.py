"""The native runner by hand-made plans: draws, logprobs of prompts, rows that fail alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.core.plan import LogitsNeed, RowStart, StepPlan
from app.core.types import SamplingParams, TokenLogprobs
from app.runner.native.budget import tokens_for_target
from app.runner.native.runner import NativeRunner
from app.runner.sampling import RowSampler, score_prompt
from tests.native_models import GREEDY, SEEDED, Hand, load_native, prompt_ids, write_model

PROMPT = prompt_ids(90)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeRunner]:
    native = load_native(write_model(tmp_path_factory.mktemp("native") / "model"), num_threads=2)
    yield native
    native.close()


def sampler(params: SamplingParams) -> RowSampler:
    return RowSampler(RowStart("0", params, PROMPT, ()), 515, (0,))


def test_the_largest_logit_in_c_is_the_samplers(runner: NativeRunner) -> None:
    for start in range(0, 90, 30):
        part = PROMPT[: start + 30]
        hand = Hand(runner)
        logits = hand.logits(hand.entry(1, part, (1, 2)))[0]
        (result,) = hand.run(hand.entry(2, part, (3, 4), params=GREEDY))
        assert result.token_ids == (sampler(GREEDY).sample_row(logits, len(part))[0],) == (int(logits.argmax()),)


def test_a_seeded_draw_is_the_samplers(runner: NativeRunner) -> None:
    params = SamplingParams(seed=3, max_tokens=9, temperature=0.9, top_p=0.9, num_logprobs=3)
    hand = Hand(runner)
    logits = hand.logits(hand.entry(1, PROMPT, (1, 2)))[0]
    (result,) = hand.run(hand.entry(2, PROMPT, (3, 4), params=params))
    token_id, logprobs = sampler(params).sample_row(logits, len(PROMPT))
    assert result.token_ids == (token_id,)
    assert result.logprobs == (logprobs,)


def test_min_tokens_keeps_greedy_rows_from_ending(runner: NativeRunner) -> None:
    hand = Hand(runner)
    best = int(hand.logits(hand.entry(1, PROMPT, (1, 2)))[0].argmax())
    params = SamplingParams(seed=3, max_tokens=9, temperature=0.0, min_tokens=1, stop_token_ids=(best,))
    (result,) = hand.run(hand.entry(2, PROMPT, (3, 4), params=params))
    assert result.token_ids != (best,)
    (result,) = hand.run(hand.entry(2, PROMPT[-1:], (3, 4), start=89))  # the second output may be the stop token
    assert result.token_ids


def test_prompt_logprobs_are_those_of_single_steps(runner: NativeRunner) -> None:
    hand = Hand(runner)
    expected = score_prompt(hand.prompt_logits(1, PROMPT, (1, 2))[:-1], PROMPT[1:], 2)
    params = SamplingParams(seed=3, max_tokens=9, temperature=0.0, num_prompt_logprobs=2)
    got: list[TokenLogprobs] = []
    for start, end in ((0, 50), (50, 90)):
        last = end == 90
        (result,) = hand.run(
            hand.entry(
                2, PROMPT[start:end], (3, 4), start=start, params=params, logits=LogitsNeed.ALL, sample=last,
                prompt=PROMPT,
            )
        )  # fmt: skip
        got.extend(result.prompt_logprobs)
        assert bool(result.token_ids) == last
    assert tuple(got) == expected


def test_a_row_whose_logits_are_not_finite_fails_alone(runner: NativeRunner) -> None:
    hand = Hand(runner)
    hand.run(hand.entry(1, PROMPT, (1, 2), params=GREEDY), hand.entry(2, PROMPT, (3, 4)))
    runner.model.kv[3] = 0x7FC0
    good, bad = hand.run(hand.entry(1, PROMPT[:1], (1, 2), start=90), hand.entry(2, PROMPT[:1], (3, 4), start=90))
    runner.model.kv[:] = 0
    assert good.error is None and len(good.token_ids) == 1
    assert bad.error is not None and "not finite" in bad.error and bad.token_ids == ()


def test_a_released_row_begins_anew(runner: NativeRunner) -> None:
    hand = Hand(runner)
    (first,) = hand.run(hand.entry(1, PROMPT, (1, 2), params=SEEDED))
    hand.started.clear()
    entry = hand.entry(1, PROMPT, (7, 8), params=SEEDED)
    plan = StepPlan(step_id=9, entries=(entry,), released_rows=(1,))
    assert runner.sample(plan, runner.forward(plan)).rows[0].token_ids == first.token_ids


def test_an_empty_vocabulary_of_ids_is_an_error_of_the_row(runner: NativeRunner) -> None:
    hand = Hand(runner)
    params = SamplingParams(seed=3, max_tokens=9, temperature=0.0, allowed_token_ids=(0,), min_tokens=1)
    good, bad = hand.run(hand.entry(1, PROMPT, (1, 2)), hand.entry(2, PROMPT, (3, 4), params=params))
    assert good.error is None
    assert bad.error is not None


def test_the_budget_is_whole_blocks() -> None:
    def budget(target_ms: float, most_tokens: int) -> int:
        return tokens_for_target(lambda count: None, target_ms=target_ms, most_tokens=most_tokens, num_threads=2)

    assert budget(100.0, 300) == 256
    assert budget(100.0, 10) == 64
    assert budget(1e-9, 9999) == 64


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 3.0}, {"top_p": 0.8, "top_k": 90}, {"temperature": 0.0, "repetition_penalty": 1.7}],
    ids=str,
)
def test_draws_in_c_are_the_samplers(runner: NativeRunner, fields: dict[str, Any]) -> None:
    hand = Hand(runner)
    logits = hand.logits(hand.entry(0, PROMPT, (1, 2)))[0]
    for seed in range(50):
        params = SamplingParams(seed=seed * 2**40 + seed, max_tokens=9, **fields)
        hand.started.clear()
        plan = StepPlan(step_id=0, entries=(hand.entry(3, PROMPT, (1, 2), params=params),))
        forward = runner.forward(plan)
        token_id, _ = sampler(params).sample_row(logits, len(PROMPT))
        assert runner.draw_rows(plan.entries, forward, {}) == {0: token_id}
        assert runner.sample(plan, forward).rows[0].token_ids == (token_id,)


def test_logits_of_padding_never_win(tmp_path: Path) -> None:
    native = load_native(write_model(tmp_path, {"vocab_size": 65}))
    hand = Hand(native)
    prompt = tuple(np.array(PROMPT) % 65)
    (result,) = hand.run(hand.entry(0, [int(token_id) for token_id in prompt], (1, 2), params=GREEDY))
    assert 0 <= result.token_ids[0] < 65
    native.close()
