"""Draws for all rows of a step at once, on the device: the order of `app.runner.sampling`, Gumbel noise.

Filters sort each row that has one, which a GPU does faster than it would search for borders. Ties go to
the lowest id everywhere: in stable sorts, and in a largest-value search of our own (torch's argmax
promises none).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from app.core.types import SamplingParams, TokenLogprobs
from app.runner.base import Bitmask
from app.runner.sampling import RowError, RowSampler
from app.runner.sampling.draw import is_greedy
from app.runner.sampling.logprobs import LOWEST_LOGPROB
from app.runner.torch.sampling.changes import apply_changes, apply_masks
from app.runner.torch.sampling.philox import gumbel_noise


@dataclass(frozen=True)
class DrawRequest:
    """One row's draw: whose, and for which position."""

    sampler: RowSampler
    position: int
    mask: "Bitmask | None" = None
    """What the row's grammar allows there."""


@dataclass(frozen=True)
class Drawn:
    """What a draw brought: a token, or why there is none."""

    token_id: int = -1
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    is_request_fault: bool = False


def draw_batch(logits: torch.Tensor, requests: Sequence[DrawRequest]) -> list[Drawn]:
    """One result a row of raw float32 logits (num_rows, vocab_size), which are not written.

    Tokens are observed by their rows' samplers.
    """
    samplers = [request.sampler for request in requests]
    changed = apply_changes(logits, [sampler.changes() for sampler in samplers])
    changed = apply_masks(changed, [request.mask for request in requests])
    scores = _with_noise(_filtered(_scores(changed, samplers), samplers), requests)
    tokens = _lowest_of_largest(scores)
    scored = _logprobs(logits, tokens, samplers)
    largest = torch.stack([logits.amax(-1), changed.amax(-1)], dim=1).tolist()
    return [
        _conclude(sampler, token_id, logprobs, largest_raw=raw, largest_changed=after)
        for sampler, token_id, logprobs, (raw, after) in zip(samplers, tokens.tolist(), scored, largest, strict=True)
    ]


def _conclude(
    sampler: RowSampler,
    token_id: int,
    logprobs: TokenLogprobs | None,
    *,
    largest_raw: float,
    largest_changed: float,
) -> Drawn:
    try:
        sampler.check(largest_raw, largest_changed)
    except RowError as error:
        return Drawn(error=str(error), is_request_fault=error.is_request_fault)
    sampler.observe(token_id)
    return Drawn(token_id, logprobs)


def _scores(logits: torch.Tensor, samplers: Sequence[RowSampler]) -> torch.Tensor:
    """(logit - largest) / temperature, (num_rows, vocab_size); greedy rows as if the temperature were 1."""
    temperatures = [1.0 if is_greedy(sampler.params) else sampler.params.temperature for sampler in samplers]
    divisor = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]
    return (logits - logits.amax(-1, keepdim=True)) / divisor


def _filtered(scores: torch.Tensor, samplers: Sequence[RowSampler]) -> torch.Tensor:
    """-inf for what min_p, top_k and top_p leave out."""
    params = [sampler.params for sampler in samplers]
    rows = [
        row
        for row, one in enumerate(params)
        if not is_greedy(one) and (one.min_p > 0.0 or one.top_k > 0 or one.top_p < 1.0)
    ]
    if rows:
        index = torch.tensor(rows, device=scores.device)
        chosen = _keep(scores.index_select(0, index), [params[row] for row in rows])
        scores = scores.index_copy(0, index, chosen)
    return scores


def _keep(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    vocab_size, device = scores.shape[1], scores.device
    floors = torch.tensor([math.log(min(p.min_p, 1.0)) if p.min_p > 0 else -math.inf for p in params], device=device)
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab_size for p in params], device=device)
    top_p = torch.tensor([min(p.top_p, 1.0) for p in params], dtype=torch.float64, device=device)
    scores = scores.masked_fill(scores < floors[:, None], -math.inf)
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    beyond = torch.arange(vocab_size, device=device)[None] >= top_k[:, None]
    weights = ordered.exp().masked_fill(beyond, 0.0).double()
    running = weights.cumsum(-1)
    outside = running - weights >= (top_p * running[:, -1])[:, None]  # enough mass stands before it
    outside[:, 0] = False
    outside &= (top_p < 1.0)[:, None]
    return scores.scatter(1, ids, ordered.masked_fill(beyond | outside, -math.inf))


def _with_noise(scores: torch.Tensor, requests: Sequence[DrawRequest]) -> torch.Tensor:
    rows = [row for row, request in enumerate(requests) if not is_greedy(request.sampler.params)]
    if not rows:
        return scores
    seeds = [requests[row].sampler.params.seed for row in rows]
    positions = [requests[row].position for row in rows]
    noise = gumbel_noise(seeds, positions, scores.shape[1], scores.device)
    return scores.index_add(0, torch.tensor(rows, device=scores.device), noise)


def _lowest_of_largest(scores: torch.Tensor) -> torch.Tensor:
    """(num_rows,) the lowest id among a row's largest scores; vocab_size - 1 where there are only NaN."""
    ids = torch.arange(scores.shape[1], device=scores.device)
    largest = scores.amax(-1, keepdim=True)
    return torch.where(scores == largest, ids, scores.shape[1] - 1).amin(-1)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, samplers: Sequence[RowSampler]) -> list[TokenLogprobs | None]:
    """Of the rows that ask for them, from raw logits."""
    scored: list[TokenLogprobs | None] = [None] * len(samplers)
    asked = {row: k for row, sampler in enumerate(samplers) if (k := sampler.params.num_logprobs) is not None}
    if not asked:
        return scored
    index = torch.tensor(list(asked), device=logits.device)
    raw, chosen = logits.index_select(0, index), tokens.index_select(0, index)[:, None]
    largest = raw.amax(-1, keepdim=True)
    log_sum = largest.double() + (raw - largest).exp().double().sum(-1, keepdim=True).log()
    top_ids = raw.argsort(dim=-1, descending=True, stable=True)[:, : max(asked.values())]
    ids = torch.cat([chosen, top_ids], dim=1)
    values = (raw.gather(1, ids).double() - log_sum).float().clamp(min=LOWEST_LOGPROB).tolist()
    ranks = (1 + (raw > raw.gather(1, chosen)).sum(-1)).tolist()
    for (row, k), row_values, row_ids, rank in zip(asked.items(), values, top_ids.tolist(), ranks, strict=True):
        scored[row] = TokenLogprobs(row_values[0], rank, tuple(row_ids[:k]), tuple(row_values[1 : k + 1]))
    return scored
