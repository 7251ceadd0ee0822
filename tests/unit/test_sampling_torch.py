"""The torch port of the sampler, on CPU tensors, against the same table and the numpy definition."""

from typing import Any

import numpy as np
import pytest

from app.core.plan import RowStart
from app.core.types import SamplingParams
from app.runner.sampling import RowSampler
from app.runner.sampling.draw import draw_gumbel
from app.runner.sampling.logprobs import token_logprobs
from app.runner.sampling.philox import gumbel_noise, split
from tests.unit.sampling_cases import EOS, NUM_DRAWS, Case, load_cases

torch = pytest.importorskip("torch", reason="the torch port needs torch")
batch = pytest.importorskip("app.runner.torch.sampling.batch")
philox = pytest.importorskip("app.runner.torch.sampling.philox")

VOCAB = 300


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_noise_is_the_definition_s() -> None:
    seeds, positions = [0, 2**64 - 1, 2**63 + 12345], [0, 2**31 + 7, 5]
    words = [torch.tensor([split(one) for one in values]).T for values in (seeds, positions)]
    noise = philox.gumbel_noise(words, 1003).numpy()
    for row, seed, position in zip(noise, seeds, positions, strict=True):
        assert row == pytest.approx(gumbel_noise(seed, position, 1003), rel=1e-5, abs=1e-5)


def draw_batch(logits: Any, requests: list[Any]) -> list[Any]:
    """In a batch of a larger size: the padding's rows are NaN."""
    size = len(logits) + 3
    padded = torch.full((size, logits.shape[1]), float("nan"))
    padded[: len(logits)] = logits
    return list(batch.DeviceSampler((size,), torch.device("cpu")).draw(padded, requests))


def by_size(cases: list[Case]) -> list[list[Case]]:
    sizes = sorted({case.vocab_size for case in cases})
    return [[case for case in cases if case.vocab_size == size] for size in sizes]


@pytest.mark.parametrize("cases", by_size(load_cases()), ids=lambda cases: f"vocabulary {cases[0].vocab_size}")
def test_cases_draw_the_committed_tokens_in_one_batch(cases: list[Case]) -> None:
    samplers = [RowSampler(case.start(), case.vocab_size, EOS) for case in cases]
    logits = torch.from_numpy(np.stack([case.logits() for case in cases]))
    before = logits.clone()
    drawn: list[list[int]] = [[] for _ in cases]
    for step in range(NUM_DRAWS):
        requests = [
            batch.DrawRequest(sampler, len(case.prompt) + len(case.output) + step)
            for sampler, case in zip(samplers, cases, strict=True)
        ]
        for tokens, one in zip(drawn, draw_batch(logits, requests), strict=True):
            tokens.append(one.token_id)
    assert torch.equal(logits, before)
    assert {case.name: tuple(tokens) for case, tokens in zip(cases, drawn, strict=True)} == {
        case.name: case.expected_gumbel for case in cases
    }


def random_params(rng: np.random.Generator) -> SamplingParams:
    def maybe(low: float, high: float, off: float) -> float:
        return float(rng.uniform(low, high)) if rng.random() < 0.4 else off

    return SamplingParams(
        seed=int(rng.integers(2**63)),
        max_tokens=9,
        min_tokens=int(rng.integers(3)),
        temperature=maybe(0.1, 3.0, float(rng.integers(2))),
        top_p=maybe(0.05, 1.0, 1.0),
        top_k=int(rng.integers(1, 50)) if rng.random() < 0.4 else 0,
        min_p=maybe(0.0, 0.5, 0.0),
        presence_penalty=maybe(-2, 2, 0.0),
        frequency_penalty=maybe(-2, 2, 0.0),
        repetition_penalty=maybe(0.5, 2.0, 1.0),
        logit_bias=((5, 3.0), (7, -100.0)) if rng.random() < 0.3 else (),
        allowed_token_ids=tuple(rng.integers(0, VOCAB, 40).tolist()) if rng.random() < 0.2 else (),
        bad_words=((4,), (5, 6)) if rng.random() < 0.3 else (),
        num_logprobs=int(rng.integers(6)) if rng.random() < 0.5 else None,
    )


def test_random_rows_equal_the_definition() -> None:
    rng = np.random.default_rng(0)
    num_rows = 200
    starts = [
        RowStart(str(row), random_params(rng), tuple(rng.integers(0, VOCAB, 5).tolist()), (5,))
        for row in range(num_rows)
    ]
    logits = np.round(rng.standard_normal((num_rows, VOCAB)) * 16).astype(np.float32) / np.float32(8)
    samplers = [RowSampler(start, VOCAB, (2,)) for start in starts]
    expected = [
        draw_gumbel(sampler.changes().apply(row), sampler.params, 6)
        for sampler, row in zip(samplers, logits, strict=True)
    ]
    requests = [batch.DrawRequest(sampler, 6) for sampler in samplers]
    drawn = draw_batch(torch.from_numpy(logits), requests)
    assert [one.token_id for one in drawn] == expected
    for row, sampler, one in zip(logits, samplers, drawn, strict=True):
        num_top = sampler.params.num_logprobs
        if num_top is None:
            assert one.logprobs is None
            continue
        reference = token_logprobs(row, one.token_id, num_top)
        assert one.logprobs.logprob == pytest.approx(reference.logprob, abs=1e-5)
        assert one.logprobs.top_logprobs == pytest.approx(reference.top_logprobs, abs=1e-5)
        assert (one.logprobs.rank, one.logprobs.top_token_ids) == (reference.rank, reference.top_token_ids)


def test_a_failing_row_fails_alone() -> None:
    def start(**fields: Any) -> RowStart:
        return RowStart("r", SamplingParams(**({"seed": 1, "max_tokens": 9} | fields)), (1,), ())

    rows = [
        start(),
        start(temperature=0.0),
        start(allowed_token_ids=(2,), min_tokens=2, top_p=0.5),
        start(logit_bias=((VOCAB, 1.0),)),
        start(temperature=0.0),
        start(num_logprobs=2),
    ]
    logits = torch.randn((6, VOCAB), generator=torch.Generator().manual_seed(0))
    logits[0, 3], logits[1, 3], logits[5, 3] = float("nan"), float("inf"), float("-inf")
    requests = [batch.DrawRequest(RowSampler(row, VOCAB, (2,)), 1) for row in rows]
    errors = [one.error for one in draw_batch(logits, requests)]
    assert [error and error[:20] for error in errors] == [
        "the model's logits a",
        "the model's logits a",
        "allowed_token_ids, b",
        "logit_bias holds a t",
        None,
        None,
    ]
