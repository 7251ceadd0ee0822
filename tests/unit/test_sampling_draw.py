"""Random numbers, filters and draws of the numpy sampler against published vectors and naive versions."""

import numpy as np
import pytest
from numpy.typing import NDArray

from app.core.types import SamplingParams
from app.runner.sampling.draw import draw, draw_gumbel, inverse_cdf
from app.runner.sampling.filters import keep_ids, largest, nucleus, ordered
from app.runner.sampling.philox import GUMBEL_STREAM, gumbel_noise, philox4x32_10, split, uniform

# Known answers of Random123 (kat_vectors, philox4x32 10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox4x32_10(counter, key) == expected


def test_uniform_is_the_top_24_bits_for_seed_and_position() -> None:
    assert uniform(0, 0) == (0x6627E8D5 >> 8) / 2**24
    assert uniform(2**64 - 1, 3) != uniform(2**63 - 1, 3)
    assert uniform(5, 3) != uniform(5, 2**32 + 3)


def test_gumbel_noise_is_philox_word_by_word() -> None:
    seed, position = 0x1234567890ABCDEF, 2**33 + 5
    noise = gumbel_noise(seed, position, 10)
    for token_id in range(10):
        words = philox4x32_10((*split(position), token_id >> 2, GUMBEL_STREAM), split(seed))
        u = ((words[token_id & 3] >> 9) + 0.5) / 2**23
        assert noise[token_id] == pytest.approx(-np.log(-np.log(u)), rel=1e-5, abs=1e-6)


def naive_order(scores: NDArray[np.float32]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def naive_nucleus(scores: NDArray[np.float32], top_p: float) -> list[int]:
    """With masses that are exact in float64: scores must be such that exp is a power of two."""
    weights = np.exp(scores).astype(np.float64)
    kept: list[int] = []
    mass = 0.0
    for token_id in naive_order(scores):
        if kept and mass >= top_p * weights.sum():
            break
        kept.append(token_id)
        mass += weights[token_id]
    return sorted(kept)


@pytest.mark.parametrize("distinct", [2, 17, 4000])
@pytest.mark.parametrize("size", [1, 2, 255, 5000])
def test_largest_breaks_ties_towards_the_lowest_id(size: int, distinct: int) -> None:
    scores = np.random.default_rng(size).integers(0, distinct, size).astype(np.float32)
    for count in {1, 2, size // 2, size - 1, size, size + 5} - {0}:
        expected = naive_order(scores)[:count]
        assert largest(scores, count).tolist() == sorted(expected)
        assert ordered(scores, largest(scores, count)).tolist() == expected


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("size", [1, 2, 1024, 1025, 6000])
def test_nucleus_is_the_smallest_head_with_the_mass(size: int, spread: float) -> None:
    steps = np.round(np.random.default_rng(size).standard_normal(size) * spread * 4)
    scores = ((steps - steps.max()) / 4).astype(np.float32)
    for top_p in (0.0, 1e-9, 0.1, 0.5, 0.9, 0.987, 0.999999):
        expected = naive_nucleus(scores, top_p)
        got = nucleus(scores, top_p).tolist()
        # Masses are summed in another order than the naive one: a border may move by one token where
        # the mass meets the target to the last bits.
        assert abs(len(got) - len(expected)) <= 1
        assert got == sorted(naive_order(scores)[: len(got)])


def test_nucleus_skips_banned_tokens() -> None:
    scores = np.full(3000, -np.inf, dtype=np.float32)
    scores[[10, 20]] = 0.0
    assert nucleus(scores, 0.99).tolist() == [10, 20]
    assert nucleus(scores, 0.5).tolist() == [10]


def test_filters_see_what_the_one_before_left() -> None:
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32) / np.float32(0.4))
    assert keep_ids(scores, min_p=0.0, top_k=0, top_p=1.0) is None
    kept = keep_ids(scores, min_p=0.0, top_k=0, top_p=0.69)
    assert kept is not None
    assert kept.tolist() == [0, 1]
    kept = keep_ids(scores, min_p=0.0, top_k=2, top_p=0.5)  # 0.4 / 0.7 of what top_k left is over 0.5
    assert kept is not None
    assert kept.tolist() == [0]
    kept = keep_ids(scores, min_p=0.6, top_k=3, top_p=1.0)
    assert kept is not None
    assert kept.tolist() == [0, 1]


def test_inverse_cdf_goes_by_id_and_never_draws_weight_zero() -> None:
    scores = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], dtype=np.float32)
    assert inverse_cdf(scores, None, 0.0) == 1
    assert inverse_cdf(scores, None, 0.4999) == 1
    assert inverse_cdf(scores, None, 0.5) == 3
    assert inverse_cdf(scores, None, 1 - 2.0**-24) == 3
    assert inverse_cdf(scores, np.array([0, 3, 4]), 0.0) == 3


def test_inverse_cdf_over_many_blocks_is_the_plain_running_sum() -> None:
    scores = np.random.default_rng(3).standard_normal(5003).astype(np.float32)
    running = np.exp(scores).astype(np.float64).cumsum()
    for u in np.linspace(0, 1 - 2.0**-24, 500):
        assert inverse_cdf(scores, None, float(u)) == int(np.searchsorted(running, u * running[-1], side="right"))


@pytest.mark.parametrize("drawer", [draw, draw_gumbel])
@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.7}])
def test_draws_follow_the_distribution(drawer: object, fields: dict[str, float]) -> None:
    """Chi-square over seeds, fixed, so it passes for ever or never."""
    assert callable(drawer)
    logits = np.log(np.array([0.3, 0.05, 0.2, 0.15, 0.1, 0.1, 0.06, 0.04], dtype=np.float32))
    num_draws = 4000
    counts = np.zeros(8)
    for seed in range(num_draws):
        params = SamplingParams(seed=seed, max_tokens=1, **fields)  # type: ignore[arg-type]
        counts[drawer(logits, params, 17)] += 1
    temperature = fields.get("temperature", 1.0)
    weights = np.exp(logits / temperature)
    kept = keep_ids(
        (logits - logits.max()) / np.float32(temperature),
        min_p=fields.get("min_p", 0.0),
        top_k=int(fields.get("top_k", 0)),
        top_p=fields.get("top_p", 1.0),
    )
    support = np.arange(8) if kept is None else kept
    assert counts.sum() == counts[support].sum()
    expected = weights[support] / weights[support].sum() * num_draws
    chi_square = ((counts[support] - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 99.9 % quantile of 7 degrees of freedom
