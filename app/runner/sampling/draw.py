"""One token from changed logits: greedy, by inverse CDF (CPU tiers) or by Gumbel noise (device tiers).

The inverse CDF goes through the kept tokens in id order (`weights` says what each weighs), and the token is
the first whose running sum exceeds u x total. u < 1 and the sum's last value is the total, so there always is one,
and a token of weight 0 is never it. Sums are exact: blocks of 256 change nothing and are five times faster.
"""

import numpy as np
from numpy.typing import NDArray

from app.core.types import SamplingParams
from app.runner.sampling.filters import Ids, keep_ids
from app.runner.sampling.philox import gumbel_noise, uniform
from app.runner.sampling.weights import Scores, weights_of

_SUM_BLOCK = 256
GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""


def is_greedy(params: SamplingParams) -> bool:
    """The largest logit is taken, and no filter matters."""
    return params.temperature < GREEDY_BELOW


def draw(logits: NDArray[np.float32], params: SamplingParams, position: int) -> int:
    """A token id from changed logits (vocab_size,), whose largest is finite."""
    best = int(logits.argmax())
    if is_greedy(params):
        return best
    scores = (logits - logits[best]) / np.float32(params.temperature)
    kept = keep_ids(scores, min_p=params.min_p, top_k=params.top_k, top_p=params.top_p)
    return inverse_cdf(scores, kept, uniform(params.seed, position))


def inverse_cdf(scores: Scores, kept: Ids | None, u: float) -> int:
    """The id among `kept` (ascending; None: all) at which the running mass first exceeds u x total."""
    weights = weights_of(scores if kept is None else scores[kept])
    starts = np.arange(0, len(weights), _SUM_BLOCK)
    ends = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()  # running sum after each block
    target = u * ends[-1]
    block = int(np.searchsorted(ends, target, side="right"))
    within = weights[starts[block] : starts[block] + _SUM_BLOCK].cumsum(dtype=np.float64)
    within += ends[block - 1] if block else 0.0
    index = int(np.searchsorted(within, target, side="right"))
    index += int(starts[block])
    return index if kept is None else int(kept[index])


def draw_gumbel(logits: NDArray[np.float32], params: SamplingParams, position: int) -> int:
    """What a device tier draws: the kept id with the largest score + noise, ties to the lowest id."""
    if is_greedy(params):
        return draw(logits, params, position)
    scores = (logits - logits.max()) / np.float32(params.temperature)
    kept = keep_ids(scores, min_p=params.min_p, top_k=params.top_k, top_p=params.top_p)
    noisy = scores + gumbel_noise(params.seed, position, len(scores))
    return int(noisy.argmax()) if kept is None else int(kept[noisy[kept].argmax()])
