"""Draws for all rows of a step at once, on the device: the order of `app.runner.sampling`, Gumbel noise.

What a request may change in its logits (penalties, biases, bans, a grammar) comes first and has the shapes of
those requests; then the draw itself, in static shapes (`sampling.draw`). The host waits once, for the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from app.core.types import TokenLogprobs
from app.runner.base import Bitmask
from app.runner.sampling import RowError, RowSampler
from app.runner.sampling.changes import NO_CHANGES
from app.runner.torch.sampling.changes import apply_changes, apply_masks
from app.runner.torch.sampling.draw import NUM_FIELDS, DrawKind, DrawnRow, draw, fields_of, read_drawn


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


class DeviceSampler:
    """Owns the static input of draws."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """`sizes` are numbers of rows of a draw, ascending."""
        self.sizes = tuple(sizes)
        self._fields = {size: torch.zeros((NUM_FIELDS, size), dtype=torch.int64, device=device) for size in sizes}

    def draw(self, logits: torch.Tensor, requests: Sequence[DrawRequest]) -> list[Drawn]:
        """One result a request; tokens are observed by their rows' samplers.

        `logits` are raw float32 (size, vocab_size), which are not written; rows after the requests' are padding.
        """
        samplers = [request.sampler for request in requests]
        padding = len(logits) - len(requests)
        changed = apply_changes(logits, [sampler.changes() for sampler in samplers] + [NO_CHANGES] * padding)
        changed = apply_masks(changed, [request.mask for request in requests])
        params = [sampler.params for sampler in samplers]
        fields = fields_of(params, [request.position for request in requests], len(logits))
        kind = DrawKind.of(params)
        drawn = draw(logits, changed, self._fields[len(logits)].copy_(torch.from_numpy(fields)), kind)
        return [_conclude(sampler, row) for sampler, row in zip(samplers, read_drawn(drawn, kind), strict=False)]


def _conclude(sampler: RowSampler, row: DrawnRow) -> Drawn:
    try:
        sampler.check(row.largest_raw, row.largest_changed)
    except RowError as error:
        return Drawn(error=str(error), is_request_fault=error.is_request_fault)
    sampler.observe(row.token_id)
    num_top = sampler.params.num_logprobs
    if num_top is None:
        return Drawn(row.token_id)
    top_ids, top_logprobs = row.top_token_ids[:num_top], row.top_logprobs[:num_top]
    return Drawn(row.token_id, TokenLogprobs(row.logprob, row.rank, top_ids, top_logprobs))
