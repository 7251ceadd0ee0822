"""One forward pass: plan in, logits out. Owns the model, the KV pool and the input buffers."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from app.core.plan import StepPlan
from app.runner.torch.attention.context import AttentionContext
from app.runner.torch.kv_cache import KVCache
from app.runner.torch.packing import Packer


@dataclass(frozen=True)
class StepLogits:
    """Logits of one step, on the device, in the model's dtype."""

    logits: torch.Tensor
    """(num_logits, vocab_size)."""
    spans: tuple[slice, ...]
    """For each entry of the plan, its rows of `logits`."""


class Executor:
    """Runs plans on one device. A step's KV is written by the pass that computes its logits."""

    def __init__(self, model: PreTrainedModel, *, kv_cache: KVCache, packer: Packer, vocab_size: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._packer = packer
        self.vocab_size = vocab_size
        self.block_size = kv_cache.block_size
        self.num_blocks = kv_cache.num_blocks
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Compute all tokens of a plan. Returns at once on a GPU."""
        batch = self._packer.pack(plan)
        self._kv_cache.clear(batch.new_blocks)
        out = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            logits_to_keep=batch.logits_indices,
            paged=AttentionContext(batch, self._kv_cache, self.dtype),
        )
        return StepLogits(out.logits[0], batch.logits_spans)
