"""min_p, top_k and top_p: which tokens may be drawn. None of them sorts the whole vocabulary.

Tokens are ordered by (logit, largest first; id, lowest first), so a border between equal logits falls
towards the lowest ids. Scores are (logit - largest) / temperature: 0 at the top, never positive.
"""

import math

import numpy as np
from numpy.typing import NDArray

from app.runner.sampling.weights import Scores, weights_of

Ids = NDArray[np.int64]

_SHORTLIST = 1024


def keep_ids(scores: Scores, *, min_p: float, top_k: int, top_p: float) -> Ids | None:
    """Ids that may be drawn, ascending; None where no filter is on."""
    kept: Ids | None = None
    if min_p > 0.0:
        kept = np.flatnonzero(scores >= np.float32(math.log(min(min_p, 1.0))))
    if 0 < top_k < (len(scores) if kept is None else len(kept)):
        kept = _take(kept, largest(scores if kept is None else scores[kept], top_k))
    if top_p < 1.0:
        kept = _take(kept, nucleus(scores if kept is None else scores[kept], top_p))
    return kept


def largest(scores: Scores, count: int) -> Ids:
    """Indices of the `count` first tokens in order, ascending. Everything where there are no more."""
    if count >= len(scores):
        return np.arange(len(scores))
    border = np.partition(scores, len(scores) - count)[len(scores) - count]
    return _above_and_equal(scores, border, count)


def nucleus(scores: Scores, top_p: float) -> Ids:
    """Indices, ascending, of the tokens before which (in order) less than `top_p` of the mass stands.

    The first token is always among them. Masses are sums in float64 of `weights_of`, which are exact.
    """
    weights = weights_of(scores)
    target = top_p * float(weights.sum(dtype=np.float64))
    head = largest(scores, _SHORTLIST)
    head_mass = float(weights[head].sum(dtype=np.float64))
    if head_mass >= target:
        return head[_nucleus_of_few(scores[head], weights[head], target)]
    border, count = _nucleus_border(scores, weights, target)
    return _above_and_equal(scores, border, count)


def ordered(scores: Scores, indices: Ids) -> Ids:
    """`indices` (ascending) by largest score first, ties to the lowest index."""
    return indices[np.argsort(-scores[indices], kind="stable")]


def _take(kept: Ids | None, indices: Ids) -> Ids:
    return indices if kept is None else kept[indices]


def _above_and_equal(scores: Scores, border: np.float32, count: int) -> Ids:
    """Indices, ascending, of all scores above `border` and of the first that equal it, `count` in all."""
    indices = np.flatnonzero(scores >= border)
    surplus = len(indices) - count
    if surplus > 0:
        equal = np.flatnonzero(scores[indices] == border)
        indices = np.delete(indices, equal[len(equal) - surplus :])
    return indices


def _nucleus_of_few(scores: Scores, weights: Scores, target: float) -> Ids:
    """`nucleus` within a list short enough to sort: indices, ascending."""
    order = ordered(scores, np.arange(len(scores)))
    before = np.cumsum(weights[order], dtype=np.float64)
    count = 1 + int(np.searchsorted(before, target, side="left"))
    return np.sort(order[:count])


def _nucleus_border(scores: Scores, weights: Scores, target: float) -> tuple[np.float32, int]:
    """The lowest score in the nucleus and the size of the nucleus, by halving around the median.

    Each round drops the half that does not hold the border, so all rounds together look at about
    twice the vocabulary.
    """
    mass_above, num_above = 0.0, 0
    while True:
        pivot = np.partition(scores, len(scores) // 2)[len(scores) // 2]
        upper, equal = scores > pivot, scores == pivot
        upper_mass = float(weights[upper].sum(dtype=np.float64))
        weight = float(weights[equal][0])
        num_upper, num_equal = int(np.count_nonzero(upper)), int(np.count_nonzero(equal))
        if mass_above + upper_mass >= target:
            scores, weights = scores[upper], weights[upper]
            continue
        mass_above, num_above = mass_above + upper_mass, num_above + num_upper
        if mass_above + num_equal * weight >= target or num_upper + num_equal == len(scores):
            return pivot, num_above + _num_needed(target, mass_above, weight, num_equal)
        lower = ~(upper | equal)
        mass_above, num_above = mass_above + num_equal * weight, num_above + num_equal
        scores, weights = scores[lower], weights[lower]


def _num_needed(target: float, mass_above: float, weight: float, num_equal: int) -> int:
    """The fewest of `num_equal` tokens, one at least, with which the mass reaches `target`; all where none do."""
    if weight == 0.0:
        return 1
    needed = max(1, math.ceil((target - mass_above) / weight) - 1)  # a quotient may be rounded up
    while needed < num_equal and mass_above + needed * weight < target:
        needed += 1
    return min(needed, num_equal)
