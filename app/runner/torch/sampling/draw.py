"""The draw of all rows of a step: tensors in, one tensor out, and no word from the host in between.

Nothing here asks a tensor for its value, so a GPU need not be waited for and a graph can be captured over it. What
differs between steps is in `fields`, one array that is uploaded at once; what changes the operations themselves
is `DrawKind`, which follows from the parameters alone. Every row passes through every operation of its kind: one
that asks for no filter keeps all of its tokens.

Filters sort, which a GPU does faster than it would search for borders. Ties go to the lowest id everywhere: in
stable sorts, and in a largest-value search of our own (torch's argmax promises none).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.core.types import SamplingParams
from app.runner.sampling.draw import is_greedy
from app.runner.sampling.logprobs import LOWEST_LOGPROB
from app.runner.sampling.philox import split
from app.runner.torch.sampling.philox import gumbel_noise
from app.runner.torch.sampling.weights import weights_of

NUM_FIELDS = 9
"""Of a row: temperature, floor of min_p, top_p (bits of a float64), top_k, words of seed and position, is greedy."""


@dataclass(frozen=True)
class DrawKind:
    """Which operations a draw has."""

    has_filters: bool
    has_noise: bool
    num_top: int | None
    """Most alternatives that a row asks for; None where no row asks for logprobs."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> "DrawKind":
        """What some row needs."""
        random = [one for one in params if not is_greedy(one)]
        asked = [one.num_logprobs for one in params if one.num_logprobs is not None]
        return cls(
            has_filters=any(one.min_p > 0.0 or one.top_k > 0 or one.top_p < 1.0 for one in random),
            has_noise=bool(random),
            num_top=max(asked) if asked else None,
        )


@dataclass(frozen=True)
class DrawnRow:
    """What a draw says of one row."""

    token_id: int
    largest_raw: float
    largest_changed: float
    """Of the logits, NaN where one is."""
    rank: int = 0
    logprob: float = 0.0
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def fields_of(params: Sequence[SamplingParams], positions: Sequence[int], size: int) -> NDArray[np.int64]:
    """(NUM_FIELDS, size) the parameters of each row; greedy padding after the last."""
    reals = np.zeros((3, size), dtype=np.float64)
    reals[0], reals[1], reals[2] = 1.0, -np.inf, 1.0
    words = np.zeros((6, size), dtype=np.int64)
    words[5] = 1
    for row, (one, position) in enumerate(zip(params, positions, strict=True)):
        if is_greedy(one):
            continue
        floor = math.log(min(one.min_p, 1.0)) if one.min_p > 0.0 else -math.inf
        reals[:, row] = one.temperature, floor, min(one.top_p, 1.0)
        words[:, row] = max(0, one.top_k), *split(one.seed), *split(position), 0
    return np.concatenate([reals.view(np.int64), words])


def draw(raw: torch.Tensor, changed: torch.Tensor, fields: torch.Tensor, kind: DrawKind) -> torch.Tensor:
    """float64 (num_rows, 3 or more) for `read_drawn`, of raw and changed float32 logits (num_rows, vocab_size).

    `fields` is (NUM_FIELDS, num_rows) int64.
    """
    temperature, floor, top_p = fields[:3].view(torch.float64)
    is_random = (fields[8] == 0)[:, None]
    scores = (changed - changed.amax(-1, keepdim=True)) / temperature.float()[:, None]
    if kind.has_filters:
        scores = _keep(scores, floor.float(), fields[3], top_p)
    if kind.has_noise:
        noise = gumbel_noise((fields[4:6], fields[6:8]), scores.shape[1])
        scores = torch.where(is_random, scores + noise, scores)
    tokens = _lowest_of_largest(scores)
    columns = [tokens.double()[:, None], raw.amax(-1, keepdim=True).double(), changed.amax(-1, keepdim=True).double()]
    if kind.num_top is not None:
        columns += _scored(raw, tokens[:, None], kind.num_top)
    return torch.cat(columns, dim=1)


def read_drawn(drawn: torch.Tensor, kind: DrawKind) -> Iterator[DrawnRow]:
    """Waits for the device."""
    num_top = kind.num_top
    for token_id, largest_raw, largest_changed, *scored in drawn.tolist():
        row = DrawnRow(int(token_id), largest_raw, largest_changed)
        if num_top is not None:
            rank, logprob, *top = scored
            top_ids = tuple(map(int, top[:num_top]))
            row = DrawnRow(
                row.token_id, largest_raw, largest_changed, int(rank), logprob, top_ids, tuple(top[num_top:])
            )
        yield row


def _keep(scores: torch.Tensor, floor: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """-inf for what min_p, top_k (0: all) and top_p leave out; a row's parameters are (num_rows,)."""
    scores = scores.masked_fill(scores < floor[:, None], -math.inf)
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device)[None]
    beyond = (places >= top_k[:, None]) & (top_k > 0)[:, None]
    weights = weights_of(ordered).masked_fill(beyond, 0.0).double()  # whose sums are exact
    running = weights.cumsum(-1)
    outside = running - weights >= (top_p * running[:, -1])[:, None]  # enough mass stands before it
    outside &= (places > 0) & (top_p < 1.0)[:, None]
    return scores.scatter(1, ids, ordered.masked_fill(beyond | outside, -math.inf))


def _lowest_of_largest(scores: torch.Tensor) -> torch.Tensor:
    """(num_rows,) the lowest id among a row's largest scores; vocab_size - 1 where there are only NaN."""
    ids = torch.arange(scores.shape[1], device=scores.device)
    largest = scores.amax(-1, keepdim=True)
    return torch.where(scores == largest, ids, scores.shape[1] - 1).amin(-1)


def _scored(raw: torch.Tensor, chosen: torch.Tensor, num_top: int) -> list[torch.Tensor]:
    """Rank and logprob of the chosen token (num_rows, 1), ids and logprobs of the likeliest: columns in float64."""
    largest = raw.amax(-1, keepdim=True)
    log_sum = largest.double() + (raw - largest).exp().double().sum(-1, keepdim=True).log()
    top_ids = raw.argsort(dim=-1, descending=True, stable=True)[:, :num_top]
    rank = 1 + (raw > raw.gather(1, chosen)).sum(-1, keepdim=True)
    ids = torch.cat([chosen, top_ids], dim=1)
    logprobs = (raw.gather(1, ids).double() - log_sum).float().clamp(min=LOWEST_LOGPROB).double()
    return [rank.double(), logprobs[:, :1], top_ids.double(), logprobs[:, 1:]]
