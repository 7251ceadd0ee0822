"""What share of the machine's matrix-product peak a training step reaches, beside a plain loop of the same shapes.

`python -m app.training.speed` prints one row for each size. Figures are of one thread and of processor time, so that
other work on the machine disturbs them little. The peak is a bfloat16 (or float32) product of 2,048-wide squares.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from app.console import answer
from app.training.devices import autocast, choose_dtype
from app.training.model import build_model, packed_logits, summed_loss
from app.training.optimizer import make_optimizer
from app.training.packing import Rows
from app.training.recipe import ModelTable, ScheduleTable, TrainTable

_CPU = torch.device("cpu")
_VOCAB_SIZE, _CONTEXT, _ROWS, _REPEATS = 4096, 512, 4, 3
_SIZES = {
    "3M": ModelTable(
        architecture="llama", hidden_size=192, layers=5, heads=6, kv_heads=3, intermediate_size=512, context=_CONTEXT
    ),
    "30M": ModelTable(
        architecture="llama", hidden_size=512, layers=9, heads=8, kv_heads=8, intermediate_size=1408, context=_CONTEXT
    ),
}
_TRAIN = TrainTable(steps=1, rows_per_step=_ROWS, schedule=ScheduleTable(kind="cosine", learning_rate=1e-3))


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    dtype = choose_dtype(_TRAIN.dtype, _CPU)
    peak = _gemm_peak(dtype)
    answer(f"peak {peak / 1e9:.0f} GFLOP/s, {str(dtype).removeprefix('torch.')}, one thread")
    for name, table in _SIZES.items():
        model = build_model(table, vocab_size=_VOCAB_SIZE, start_id=1, end_id=0, seed=0)
        flops = _step_flops(model, table)
        for loop, step in (("headwater", _packed_step(model, dtype)), ("plain eager", _plain_step(model, dtype))):
            seconds = _best_seconds(step)
            answer(
                f"{name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f}M), {loop}: "
                f"{_ROWS * _CONTEXT / seconds:,.0f} tokens/s, {flops / seconds / peak:.1%} of the peak"
            )


def _gemm_peak(dtype: torch.dtype) -> float:
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / _best_seconds(lambda: torch.mm(a, b))


def _step_flops(model: PreTrainedModel, table: ModelTable) -> float:
    """Forward and backward of matrices (6 a parameter and token, the tied head included) and of causal attention."""
    num_tokens = _ROWS * _CONTEXT
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    return 6.0 * matrices * num_tokens + 6.0 * table.layers * table.hidden_size * _CONTEXT * num_tokens


def _packed_step(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[], None]:
    """As the loop does it: two documents a row, a mask between them."""
    optimizer, mixed = make_optimizer(model, _TRAIN), autocast(dtype, _CPU)
    ids, half = _token_ids(), _CONTEXT // 2
    positions = np.tile(np.concatenate([np.arange(half), np.arange(half)]), (_ROWS, 1))
    rows = Rows(ids[:, :-1], ids[:, 1:], positions, np.tile(np.repeat([0, 1], half), (_ROWS, 1)))

    def step() -> None:
        with mixed():
            logits = packed_logits(model, rows, device=_CPU, dtype=dtype)
        (summed_loss(logits, rows) / ids[:, 1:].size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(_TRAIN.schedule.learning_rate)

    return step


def _plain_step(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[], None]:
    """What one writes without packing: one document a row, the model's own loss."""
    optimizer, mixed = torch.optim.AdamW(model.parameters()), autocast(dtype, _CPU)
    ids = torch.from_numpy(_token_ids()[:, :-1])

    def step() -> None:
        with mixed():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, _VOCAB_SIZE, (_ROWS, _CONTEXT + 1))


def _best_seconds(work: Callable[[], object]) -> float:
    """Processor time of the fastest of some calls, after one that is not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times[1:])


if __name__ == "__main__":
    main()
