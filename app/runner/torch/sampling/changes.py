"""Penalties, biases, bans and grammars' masks of a batch of rows, gathered into one operation a kind."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from app.runner.base import Bitmask
from app.runner.sampling.changes import LogitChanges

_Ids = Callable[[LogitChanges], NDArray[np.int64]]
_Values = Callable[[LogitChanges], NDArray[np.float32] | float]


def apply_changes(logits: torch.Tensor, changes: Sequence[LogitChanges]) -> torch.Tensor:
    """The changed logits, (num_rows, vocab_size): the given tensor itself where nothing changes, else a copy."""
    if all(change.is_empty for change in changes):
        return logits
    logits = logits.clone()
    _penalize(logits, changes)
    if (where := _where(logits, changes, lambda change: change.bias_ids)) is not None:
        logits[where] += _values(logits, changes, lambda c: c.bias_ids, lambda c: c.bias_values)
    _keep_only(logits, changes)
    if (where := _where(logits, changes, lambda change: change.banned_ids)) is not None:
        logits[where] = float("-inf")
    return logits


def apply_masks(logits: torch.Tensor, masks: "Sequence[Bitmask | None]") -> torch.Tensor:
    """-inf for the tokens that a row's mask forbids: the given tensor itself where there is none, else a copy."""
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    vocab_size, device = logits.shape[1], logits.device
    num_words = -(-vocab_size // 32)
    stacked = np.stack([mask[:num_words] for mask in masks if mask is not None])  # (num_masked, num_words)
    words = torch.from_numpy(stacked).to(device)
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device) & 1  # (num_masked, num_words, 32)
    forbidden = bits.reshape(len(rows), -1)[:, :vocab_size] == 0
    index = torch.tensor(rows, device=device)
    kept = logits.index_select(0, index).masked_fill(forbidden, float("-inf"))
    return logits.index_copy(0, index, kept)


def _penalize(logits: torch.Tensor, changes: Sequence[LogitChanges]) -> None:
    if (where := _where(logits, changes, lambda change: change.repeated_ids)) is not None:
        factors = _values(logits, changes, lambda c: c.repeated_ids, lambda c: c.repetition_penalty)
        values = logits[where]
        logits[where] = torch.where(values > 0, values / factors, values * factors)
    if (where := _where(logits, changes, lambda change: change.output_ids)) is not None:
        counts = _values(logits, changes, lambda c: c.output_ids, lambda c: c.output_counts)
        frequency = _values(logits, changes, lambda c: c.output_ids, lambda c: c.frequency_penalty)
        presence = _values(logits, changes, lambda c: c.output_ids, lambda c: c.presence_penalty)
        logits[where] -= counts * frequency + presence


def _keep_only(logits: torch.Tensor, changes: Sequence[LogitChanges]) -> None:
    where = _where(logits, changes, lambda change: change.allowed_ids)
    if where is None:
        return
    kept = logits[where]
    restricted = torch.tensor([len(change.allowed_ids) > 0 for change in changes], device=logits.device)
    logits.masked_fill_(restricted[:, None], float("-inf"))
    logits[where] = kept


def _where(
    logits: torch.Tensor, changes: Sequence[LogitChanges], ids: _Ids
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and ids that one kind of change touches, or None where no row has any."""
    sizes = [len(ids(change)) for change in changes]
    if not sum(sizes):
        return None
    rows = np.repeat(np.arange(len(changes)), sizes)
    columns = np.concatenate([ids(change) for change in changes])
    return torch.from_numpy(rows).to(logits.device), torch.from_numpy(columns).to(logits.device)


def _values(logits: torch.Tensor, changes: Sequence[LogitChanges], ids: _Ids, values: _Values) -> torch.Tensor:
    """The value for each place of `_where`, float32."""
    parts = [np.broadcast_to(np.asarray(values(c), dtype=np.float32), len(ids(c))) for c in changes]
    return torch.from_numpy(np.concatenate(parts)).to(logits.device)
