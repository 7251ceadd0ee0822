"""The output head apart from the layers, so that logits are made of few rows at a time.

Nobody but the family's own forward knows what it does around its head (scaling, softcap). So the
model's forward is run as it is, over a stand-in for its layers that hands on given hidden states.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

Head = Callable[[torch.Tensor], torch.Tensor]
"""(num_rows, hidden_size) -> (num_rows, vocab_size)."""


@dataclass
class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """All that heads of any family read of their layers' output."""

    router_logits: tuple[torch.Tensor, ...] | None = None


class _GivenStates(nn.Module):
    """Takes the place of a model's layers: its input embeddings come out as the last hidden states."""

    @property
    def decoder(self) -> "_GivenStates":
        """OPT's head calls the decoder inside its layers."""
        return self

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


class OutputHead:
    """Shares the model's weights. (num_rows, hidden_size) -> (num_rows, vocab_size)."""

    def __init__(self, model: PreTrainedModel) -> None:
        alone: Any = copy.copy(model)
        alone._modules = dict(model._modules) | {model.base_model_prefix: _GivenStates()}
        self._forward: Callable[..., Any] = alone

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._forward(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class FixedHead:
    """A head that always computes the same number of rows, so that none depends on how many were asked for."""

    def __init__(self, head: Head, num_rows: int) -> None:
        self._head = head
        self._num_rows = num_rows

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(num_rows, hidden_size) -> (num_rows, vocab_size)."""
        parts = []
        for part in hidden.split(self._num_rows):
            padded = part.new_zeros((self._num_rows, part.shape[1]))
            padded[: len(part)] = part
            parts.append(self._head(padded)[: len(part)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def split_head(model: PreTrainedModel, inputs: dict[str, Any], logits: torch.Tensor) -> OutputHead | None:
    """The head alone, or None where a family does not split: checked on `inputs`, which gave `logits` (1, 1, vocab)."""
    try:
        head = OutputHead(model)
        with torch.inference_mode():
            hidden = model.base_model(**inputs).last_hidden_state
            agrees = torch.allclose(head(hidden[0, -1:]), logits[0], rtol=1e-3, atol=1e-3)
    except Exception:  # whatever a foreign model's code raises, it does not split
        return None
    return head if agrees else None
