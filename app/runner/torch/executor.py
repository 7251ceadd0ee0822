"""One forward pass: plan in, logits out. Owns the model, the KV pool and the input buffers."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from app.core.plan import StepPlan
from app.runner.torch.attention.context import attention_context
from app.runner.torch.attention.split import RowAttention, attend_rows
from app.runner.torch.head import Head
from app.runner.torch.kv_cache import KVCache
from app.runner.torch.packing import Packer, StepBatch, logits_spans


@dataclass(frozen=True)
class StepLogits:
    """Logits of one step, on the device; made when they are asked for, where the family's head splits off."""

    states: torch.Tensor
    """(num_logits, hidden_size) in front of `head`, or the logits themselves where there is none."""
    head: Head | None
    spans: tuple[slice, ...]
    """For each entry of the plan, its rows."""

    @torch.inference_mode()
    def rows(self, indices: slice | torch.Tensor) -> torch.Tensor:
        """Logits (num_rows, vocab_size) in float32 of some rows. Ask for few at a time."""
        states = self.states[indices]
        return (states if self.head is None else self.head(states)).float()


class Executor:
    """Runs plans on one device. A step's KV is written by the pass that computes its logits."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        head: Head | None,
        kv_cache: KVCache,
        packer: Packer,
        vocab_size: int,
        attend_rows: RowAttention = attend_rows,
    ) -> None:
        self._model = model
        self._head = head
        self._kv_cache = kv_cache
        self._packer = packer
        self._attend_rows = attend_rows
        self.vocab_size = vocab_size
        self.block_size = kv_cache.block_size
        self.num_blocks = kv_cache.num_blocks
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Compute all tokens of a plan. Returns at once on a GPU."""
        states = [self._forward(batch) for batch in self._packer.batches(plan)]
        return StepLogits(states[0] if len(states) == 1 else torch.cat(states), self._head, logits_spans(plan.entries))

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        """(num_logits, hidden_size) in front of the head, or logits where there is none."""
        self._kv_cache.clear(batch.new_blocks)
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
            "paged": attention_context(batch, self._kv_cache, self.dtype, attend_rows=self._attend_rows),
        }
        if self._head is None:
            logits: torch.Tensor = self._model(**inputs, logits_to_keep=batch.logits_indices).logits[0]
            return logits
        return self._model.base_model(**inputs).last_hidden_state[0].index_select(0, batch.logits_indices)
