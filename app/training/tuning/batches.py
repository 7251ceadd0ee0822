"""Encoded examples as padded batches, in an order that the seed and the epoch fix."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from app.training.packing import NO_LABEL
from app.training.tuning.encoding import Encoded


@dataclass(frozen=True)
class Batch:
    """Padded on the right; all tensors are (num_examples, num_tokens)."""

    token_ids: Tensor
    mask: Tensor
    """1 where a token is, 0 where padding is."""
    labels: Tensor
    """Of the same position's token; NO_LABEL where it is no answer."""

    @property
    def num_labels(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels[:, 1:] != NO_LABEL).sum())


def make_batch(examples: Sequence[Encoded], *, device: torch.device) -> Batch:
    """Pad to the longest."""
    width = max(len(example.token_ids) for example in examples)
    token_ids = np.zeros((len(examples), width), np.int64)
    mask, labels = np.zeros_like(token_ids), np.full_like(token_ids, NO_LABEL)
    for row, example in enumerate(examples):
        ids = np.array(example.token_ids)
        token_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        labels[row, : len(ids)] = np.where(example.is_answer, ids, NO_LABEL)
    return Batch(*(torch.from_numpy(array).to(device) for array in (token_ids, mask, labels)))


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> list[int]:
    """Which examples an epoch reads, one after the other."""
    return [int(index) for index in np.random.default_rng([seed, epoch]).permutation(num_examples)]


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits before each token but the first, and its labels.  # (num_examples, num_tokens - 1, vocab_size)"""
    logits = model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
    return logits, batch.labels[:, 1:]


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the tokens of answers."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )
