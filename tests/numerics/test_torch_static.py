"""Decode steps and draws in static shapes, as a GPU gets them, on the CPU device.

What a CUDA graph needs is tried with a trace: operations recorded once, with no Python between them, are run again
over the same memory with other contents.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from app.core.plan import LogitsNeed, PlanEntry, StepPlan
from app.core.types import SamplingParams
from app.runner.sampling.draw import draw_gumbel
from app.runner.torch.any_tier import load
from app.runner.torch.attention.context import attention_context
from app.runner.torch.attention.split import attend_rows
from app.runner.torch.check import probe_model
from app.runner.torch.executor import Executor
from app.runner.torch.kv_cache import KVCache
from app.runner.torch.loading import load_model
from app.runner.torch.packing import ChunkPacker, StepBatch
from app.runner.torch.rows import DecodePacker, RowBatch, RowPacker
from app.runner.torch.runner import TorchRunner
from app.runner.torch.sampling.batch import DeviceSampler
from app.runner.torch.sampling.draw import DrawKind, draw, fields_of, read_drawn
from app.runner.torch.sizes import DECODE_SIZES, passes
from tests.numerics.driver import Driver, assert_same, greedy
from tests.numerics.families import NUM_TOKENS, VOCAB, Reference, make_reference
from tests.numerics.test_torch_runner import config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    torch.set_num_threads(1)
    return make_reference("llama", tmp_path_factory.mktemp("model"))


class Recorder:
    """A packer that notes what another one hands out."""

    def __init__(self, packer: DecodePacker) -> None:
        self._packer = packer
        self.sizes: set[int] = set()
        self.addresses: dict[str, set[int]] = {}

    def batches(self, plan: StepPlan) -> Iterator[StepBatch]:
        for batch in self._packer.batches(plan):
            assert isinstance(batch, RowBatch) == all(len(entry.token_ids) == 1 for entry in plan.entries)
            if isinstance(batch, RowBatch):
                self._note(batch)
            yield batch

    def _note(self, batch: RowBatch) -> None:
        tensors = {
            "ids": batch.input_ids,
            "positions": batch.position_ids,
            "slots": batch.slots,
            "lengths": batch.rows.seq_lens,
            "tables": batch.rows.block_tables,
        }
        self.sizes |= {tensor.numel() for name, tensor in tensors.items() if name != "tables"}
        for name, tensor in tensors.items():
            self.addresses.setdefault(name, set()).add(tensor.data_ptr())


def make_executor(folder: Path) -> tuple[Executor, Recorder, KVCache]:
    loaded = load_model(config(folder), CPU)
    probed = probe_model(loaded.model, CPU)
    cache = KVCache(probed.layers, num_blocks=400, block_size=8, dtype=loaded.dtype, device=CPU)
    rows = RowPacker(cache, device=CPU, sizes=DECODE_SIZES, max_model_len=256)
    packer = Recorder(DecodePacker(rows, ChunkPacker(cache, device=CPU)))
    return Executor(loaded.model, head=probed.head, kv_cache=cache, packer=packer, vocab_size=VOCAB), packer, cache


def test_decode_steps_read_the_same_memory_in_sizes_of_the_list(reference: Reference) -> None:
    executor, packer, _ = make_executor(reference.folder)
    info = load(config(reference.folder)).info
    runner = TorchRunner(executor, info=info, eos_token_ids=(), sampler=DeviceSampler(DECODE_SIZES, CPU))
    driver = Driver(runner, num_kv_blocks=400)
    lengths = [1 + index % NUM_TOKENS for index in range(30)]
    prompts = [reference.prompts[index % 3] for index in range(30)]
    outputs = driver.run(prompts, [greedy(length) for length in lengths])
    for index, (got, length) in enumerate(zip(outputs, lengths, strict=True)):
        expected, margins = reference.outputs[index % 3][:length], reference.margins[index % 3][:length]
        assert_same(got, expected, margins, what=f"prompt {index}")
    assert {2, 4, 8, 16, 24} <= packer.sizes <= set(DECODE_SIZES)
    assert {name: len(addresses) for name, addresses in packer.addresses.items()} == dict.fromkeys(packer.addresses, 1)


def test_sizes() -> None:
    assert DECODE_SIZES[:7] == (1, 2, 4, 8, 16, 24, 32)
    assert DECODE_SIZES[-1] == 256
    assert list(passes(3, (1, 2, 4))) == [(slice(0, 3), 4)]
    assert list(passes(9, (1, 2, 4))) == [(slice(0, 4), 4), (slice(4, 8), 4), (slice(8, 9), 1)]


def test_a_decode_step_traced_once_serves_later_ones(reference: Reference) -> None:
    executor, packer, cache = make_executor(reference.folder)
    loaded = load_model(config(reference.folder), CPU)
    text = [*reference.prompts[2], *reference.outputs[2]]
    tables = [tuple(range(row * 10, row * 10 + 10)) for row in range(3)]
    for row, table in enumerate(tables):  # the row's own number of tokens of the text
        entry = PlanEntry(row, 0, tuple(text[: 20 + 9 * row]), 0, table, 10, LogitsNeed.NONE, False)
        executor.run(StepPlan(0, (entry,)))

    def step(index: int) -> StepPlan:
        starts = [20 + 9 * row + index for row in range(3)]
        return StepPlan(
            1 + index,
            tuple(
                PlanEntry(row, start, (text[start],), 0, table, 0, LogitsNeed.LAST, True)
                for row, (start, table) in enumerate(zip(starts, tables, strict=True))
            ),
        )

    def forward(batch: RowBatch) -> Any:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        return loaded.model(
            **inputs, paged=attention_context(batch, cache, loaded.dtype, attend_rows=attend_rows)
        ).logits[0]

    with torch.inference_mode():
        (batch,) = packer.batches(step(0))
        assert isinstance(batch, RowBatch)
        traced = make_fx(lambda: forward(batch))()
        for index in range(5):
            expected = executor.run(step(index)).rows(slice(None))
            (_,) = packer.batches(step(index))  # fills the memory that the trace reads
            assert torch.equal(traced()[:3], expected), index


@pytest.mark.parametrize("num_top", [None, 3])
def test_a_draw_traced_once_serves_other_rows(num_top: int | None) -> None:
    """Of every kind of row that its operations are for."""
    rng = np.random.default_rng(0)
    size, vocab_size = 24, 300

    def some_params() -> list[SamplingParams]:
        return [
            SamplingParams(
                seed=int(rng.integers(2**63)),
                max_tokens=1,
                temperature=float(rng.choice([0.0, 0.7, 1.0, 2.0])),
                top_p=float(rng.choice([0.3, 0.9, 1.0])),
                top_k=int(rng.choice([0, 5, 299])),
                min_p=float(rng.choice([0.0, 0.1])),
                num_logprobs=num_top,
            )
            for _ in range(size)
        ]

    kind = DrawKind(has_filters=True, has_noise=True, num_top=num_top)
    logits = torch.zeros((size, vocab_size))
    fields = torch.from_numpy(fields_of(some_params(), [1] * size, size))
    traced = make_fx(lambda: draw(logits, logits, fields, kind))()
    for _ in range(8):
        params, positions = some_params(), rng.integers(2**33, size=size).tolist()
        values = np.round(rng.standard_normal((size, vocab_size)) * 16).astype(np.float32) / np.float32(8)
        logits.copy_(torch.from_numpy(values))
        fields.copy_(torch.from_numpy(fields_of(params, positions, size)))
        tokens = [row.token_id for row in read_drawn(traced(), kind)]
        assert tokens == [draw_gumbel(*each) for each in zip(values, params, positions, strict=True)]


def test_rows_beyond_the_largest_size_are_drawn_in_several_batches(reference: Reference) -> None:
    info = load(config(reference.folder)).info
    params = [SamplingParams(seed=row, max_tokens=6, ignore_eos=True, top_p=0.9) for row in range(3)]
    outputs = []
    for sizes in ((1, 2), (8,)):
        executor, _, _ = make_executor(reference.folder)
        runner = TorchRunner(executor, info=info, eos_token_ids=(), sampler=DeviceSampler(sizes, CPU))
        outputs.append(Driver(runner).run(reference.prompts, params))
    assert outputs[0] == outputs[1]
