"""Penalties, biases and bans of a batch of rows: `LogitChanges`, gathered into one scatter a kind."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

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
