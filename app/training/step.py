"""One step of pretraining, and the loss on text that is held out. A step follows from the recipe and its number."""

import math

import torch
from torch import nn

from app.training.devices import autocast
from app.training.errors import TrainingStopped
from app.training.model import packed_logits, summed_loss
from app.training.packing import NO_LABEL
from app.training.run import Run, last_good
from app.training.schedule import learning_rate

_EVALUATION_ROWS = 8
"""In one forward pass."""


def train_step(run: Run) -> tuple[float, float]:
    """One step of the optimiser: (loss in nats a token, norm of the gradient before clipping).

    Raises:
        TrainingStopped: the loss or the norm is no finite number; the weights are those before the step.
    """
    train, workers = run.recipe.train, run.workers
    count = train.rows_per_step // train.accumulation // workers.count
    first = run.step * train.rows_per_step
    own = first + workers.rank * count * train.accumulation
    pieces = [run.rows.rows(own + index * count, count) for index in range(train.accumulation)]
    (num_labels,) = workers.sum([float(sum((piece.labels != NO_LABEL).sum() for piece in pieces))])
    rate = learning_rate(train.schedule, run.step, steps=train.steps)
    loss, mixed = 0.0, autocast(run.dtype, run.device)
    for piece in pieces:
        with mixed():
            logits = packed_logits(run.forward, piece, device=run.device, dtype=run.dtype)
        piece_loss = summed_loss(logits, piece) / num_labels
        piece_loss.backward()
        loss += float(piece_loss.detach())
    workers.sum_gradients(run.model.parameters())
    loss, num_stopping = workers.sum([loss, float(run.is_stopping)])
    run.is_stopping = num_stopping > 0  # all of them end after the same step
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), train.clip_norm))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise _not_finite(run, loss=loss, first=first, rate=rate)
    run.optimizer.step(rate)
    run.step += 1
    return loss, norm


def heldout_loss(run: Run) -> float:
    """Mean loss over the first rows of the held-out split, nats a token."""
    count = min(run.recipe.run.evaluate_rows, run.heldout.rows_per_epoch)
    total, num_labels, mixed = 0.0, 0, autocast(run.dtype, run.device)
    run.model.eval()
    with torch.no_grad():
        for first in range(0, count, _EVALUATION_ROWS):
            rows = run.heldout.rows(first, min(_EVALUATION_ROWS, count - first))
            with mixed():
                logits = packed_logits(run.model, rows, device=run.device, dtype=run.dtype)
            total += float(summed_loss(logits, rows))
            num_labels += int((rows.labels != NO_LABEL).sum())
    run.model.train()
    return total / num_labels


def _not_finite(run: Run, *, loss: float, first: int, rate: float) -> TrainingStopped:
    last = first + run.recipe.train.rows_per_step - 1
    return TrainingStopped(
        f"the loss of step {run.step + 1} is {loss} (rows {first} to {last}, learning rate "
        f"{rate:.2e}). {last_good(run)}; lower the learning rate or clip_norm there"
    )
