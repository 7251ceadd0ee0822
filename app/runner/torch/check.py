"""What is learnt from running a freshly loaded model: shapes, agreement with transformers, speed."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from app.core.plan import LogitsNeed, PlanEntry, StepPlan
from app.runner.base import TierUnavailable
from app.runner.memory import KVPlan
from app.runner.torch.attention.interface import PAGED, ShapeProbe, UnsupportedAttention
from app.runner.torch.executor import Executor
from app.runner.torch.head import OutputHead, split_head
from app.runner.torch.kv_cache import LayerShape

_CHECK_TOKENS = 24
_CHECK_CHUNKS = (16, 7, 1)
_TOLERANCE = {torch.float32: 0.002, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest difference of two logits, in spans of the logits: random text is nobody's favourite."""
_PROBE_TOKENS = {"cpu": 64, "cuda": 2048}
"""Tokens of the timed prefill: enough to fill the device."""
_MOST_TOKENS = 8192
"""Of a step, however fast the device: activations and prompt logits grow with them."""


@dataclass(frozen=True)
class Probed:
    """What one pass over two tokens shows."""

    layers: tuple[LayerShape, ...]
    vocab_size: int
    """Width of the logits."""
    head: OutputHead | None


def probe_model(model: PreTrainedModel, device: torch.device) -> Probed:
    """KV shapes of the attention layers, width of the logits, and the head if it splits off.

    Raises TierUnavailable where the model does not go through the attention interface as it should.
    """
    probe = ShapeProbe()
    inputs = {
        "input_ids": torch.ones((1, 2), dtype=torch.int64, device=device),
        "position_ids": torch.arange(2, device=device)[None],
        "use_cache": False,
    }
    try:
        with torch.inference_mode():
            out = model(**inputs, logits_to_keep=torch.tensor([1], device=device), paged=probe)
    except UnsupportedAttention as error:
        raise TierUnavailable(f"{model.config.model_type} does not fit the attention interface: {error}") from error
    except Exception as error:  # whatever a foreign model's code raises, it is a model that cannot run here
        raise TierUnavailable(
            f"{model.config.model_type} fails in its first forward pass ({type(error).__name__}: {error})"
        ) from error
    indices = [layer.layer_index for layer in probe.layers]
    expected = model.config.get_text_config().num_hidden_layers
    if len(indices) != expected or len(set(indices)) != expected:
        raise TierUnavailable(
            f"{model.config.model_type} called the attention of {len(set(indices))} layers, {len(indices)} times, "
            f"and has {expected}: some keep state of another kind"
        )
    if out.logits.shape[:2] != (1, 1):
        raise TierUnavailable(f"{model.config.model_type} computes logits of all tokens, asked for one")
    head = split_head(model, inputs | {"paged": ShapeProbe()}, out.logits)
    return Probed(tuple(probe.layers), out.logits.shape[-1], head)


def check_against_transformers(executor: Executor, model: PreTrainedModel) -> None:
    """Compare logits, over chunks and a decode step, with the model's own attention.

    Raises TierUnavailable where they differ: a mask or a bias that the interface does not show.
    """
    ids = np.random.default_rng(0).integers(0, executor.vocab_size, _CHECK_TOKENS).tolist()
    paged = run_chunks(executor, ids, _CHECK_CHUNKS)
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            own = model(input_ids=torch.tensor([ids], device=executor.device), use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(PAGED)
    error = float((paged - own).abs().max() / (own.max() - own.min()))
    if not error < _TOLERANCE[executor.dtype]:
        raise TierUnavailable(
            f"logits of this {model.config.model_type} differ by {error:.1%} of their range from transformers' own"
        )


def check_rows(executor: Executor) -> None:
    """Compare bits of logits of one text computed at once and in chunks, where other rows stand beside it.

    Raises TierUnavailable where they differ: a product whose shape follows what the rows hold, as some routers' do.
    """
    ids = np.random.default_rng(0).integers(0, executor.vocab_size, _CHECK_TOKENS).tolist()
    alone = run_chunks(executor, ids, (_CHECK_TOKENS,))
    if not torch.equal(alone, run_chunks(executor, ids, _CHECK_CHUNKS)):
        raise TierUnavailable(
            "its rows depend on each other, in passes of one shape too", remedy="leave out --deterministic"
        )


def run_chunks(executor: Executor, token_ids: list[int], chunks: tuple[int, ...]) -> torch.Tensor:
    """Logits (len(token_ids), vocab_size) in float32 of one sequence computed in chunks, in blocks 0, 1, ..."""
    table = tuple(range(-(-len(token_ids) // executor.block_size)))
    parts, start = [], 0
    for size in chunks:
        chunk = tuple(token_ids[start : start + size])
        entry = PlanEntry(0, start, chunk, 0, table, 0, LogitsNeed.ALL, False)
        parts.append(executor.run(StepPlan(0, (entry,))).rows(slice(None)))
        start += size
    return torch.cat(parts)


def measure_token_budget(executor: Executor, *, target_ms: float, limits: KVPlan, max_num_seqs: int) -> int:
    """Tokens of a step that takes about `target_ms`: whole blocks, and one block beside a full house of decodes."""
    most = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    size = min(_PROBE_TOKENS[executor.device.type], most)
    per_token = min(_prefill_seconds(executor, size) for _ in range(2)) / size
    measured = min(_MOST_TOKENS, int(target_ms / 1000 / per_token))
    blocks = max(1, measured // executor.block_size, 1 + -(-max_num_seqs // executor.block_size))
    return blocks * executor.block_size


def _prefill_seconds(executor: Executor, num_tokens: int) -> float:
    table = tuple(range(-(-num_tokens // executor.block_size)))
    entry = PlanEntry(0, 0, (0,) * num_tokens, 0, table, 0, LogitsNeed.LAST, False)
    begin = time.perf_counter()
    float(executor.run(StepPlan(0, (entry,))).rows(slice(None))[0, 0])  # waits for the device
    return time.perf_counter() - begin
