"""`--deterministic` of the torch runner: logits of equal bits, because no product's shape follows the plan.

What holds by shape holds on a GPU as on the CPU. Here both kinds of linear layers are tried: those packed for
the CPU, and torch's own, which a GPU has.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.core.config import EngineConfig
from app.core.plan import LogitsNeed, PlanEntry, StepPlan
from app.core.types import SamplingParams
from app.runner.base import TierUnavailable
from app.runner.memory import KVPlan
from app.runner.torch.any_tier import load
from app.runner.torch.build import make_executor
from app.runner.torch.check import check_rows, probe_model
from app.runner.torch.executor import Executor
from app.runner.torch.loading import LoadedModel, load_model
from tests.numerics.driver import Driver, assert_same, greedy
from tests.numerics.families import CONFIGS, NUM_TOKENS, VOCAB, make_model, make_reference

QUICK = ("llama", "gemma2", "gpt_oss")
"""Among them: windows, soft-caps, sinks, experts."""
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
CPU = torch.device("cpu")
BLOCK_SIZE = 8
TABLE = 32
"""Blocks of a sequence."""


def config(folder: Path, **fields: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "model_dir": str(folder),
        "dtype": "float32",
        "num_threads": 1,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 64,
        "num_kv_blocks": 64 * TABLE,
        "max_num_batched_tokens": 64,
        "deterministic": True,
    }
    return EngineConfig(**(defaults | fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers_and_themselves(family: str, tmp_path: Path) -> None:
    reference = make_reference(family, tmp_path)
    runner = load(config(tmp_path))
    assert runner.info.row_independent
    assert "-fixed-" in runner.info.fingerprint
    params = SamplingParams(seed=3, max_tokens=NUM_TOKENS, ignore_eos=True, num_logprobs=2)
    alone = [Driver(runner).run_outputs([prompt], [params])[0] for prompt in reference.prompts]
    chunked = Driver(runner, budget=5)
    for what in ("in small chunks", "with prefix hits"):
        outputs = chunked.run_outputs(reference.prompts, [params] * len(reference.prompts))
        assert [tokens_and_logprobs(one) for one in outputs] == [tokens_and_logprobs(one) for one in alone], what
    answers = Driver(runner, budget=16).run(reference.prompts, greedy(NUM_TOKENS))
    for got, expected, margins in zip(answers, reference.outputs, reference.margins, strict=True):
        assert_same(got, expected, margins, what=family)


def tokens_and_logprobs(outputs: Sequence[Any]) -> list[tuple[int, Any]]:
    return [pair for one in outputs for pair in zip(one.token_ids, one.logprobs, strict=True)]


# Bits of logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model("llama", path)
    return path


@pytest.fixture(scope="module", params=["packed linears", "torch's linears", "torch's linears in bfloat16"])
def executor(request: pytest.FixtureRequest, folder: Path) -> Executor:
    dtype = "bfloat16" if "bfloat16" in request.param else "float32"
    settings = config(folder, dtype=dtype)
    return executor_of(load_model(settings, CPU, packs_linears=request.param == "packed linears"), settings)


def executor_of(loaded: LoadedModel, settings: EngineConfig) -> Executor:
    plan = KVPlan(num_blocks=64 * TABLE, block_size=BLOCK_SIZE, num_bytes=0, max_model_len=256)
    return make_executor(settings, loaded, probe_model(loaded.model, loaded.device), plan)


def texts() -> list[list[int]]:
    """64 of 3 to 66 tokens; the first is longer than a split of its attention."""
    generator = torch.Generator().manual_seed(1)
    lengths = [150, *range(4, 67)]
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def entry(row: int, start: int, token_ids: Sequence[int], need: LogitsNeed = LogitsNeed.ALL) -> PlanEntry:
    table = tuple(range(row * TABLE, (row + 1) * TABLE))
    return PlanEntry(row, start, tuple(token_ids), 0, table, 0, need, False)


def logits(executor: Executor, *entries: PlanEntry) -> list[torch.Tensor]:
    """Of each entry, (num_logits, vocab_size)."""
    step = executor.run(StepPlan(0, entries))
    return [step.rows(span) for span in step.spans]


def test_a_decode_step_s_logits_have_the_same_bits_in_batches_of_1_7_32_and_64(executor: Executor) -> None:
    check_batches(executor)


def test_chunks_and_company_change_no_bit(executor: Executor) -> None:
    check_chunks(executor)


def check_batches(executor: Executor) -> None:
    """On any device: a decode step alone and in company."""
    every = texts()
    for row, text in enumerate(every):
        logits(executor, entry(row, 0, text[:-1], LogitsNeed.NONE))
    steps = [entry(row, len(text) - 1, text[-1:]) for row, text in enumerate(every)]
    whole = logits(executor, *steps)
    for size in (1, 7, 32):
        for first in (0, 20):
            part = logits(executor, *steps[first : first + size])
            assert all(map(torch.equal, part, whole[first : first + size])), size
    assert all(map(torch.equal, logits(executor, *reversed(steps)), reversed(whole)))


def check_chunks(executor: Executor) -> None:
    """On any device: a prompt at once and in chunks."""
    text, *others = texts()
    (whole,) = logits(executor, entry(0, 0, text))
    crowd = [entry(row + 1, 0, other, LogitsNeed.LAST) for row, other in enumerate(others[:5])]
    for sizes in ((1, 7, 142), (150,), (16, 17, 117)):
        parts, start = [], 0
        for size in sizes:
            parts.append(logits(executor, *crowd[:2], entry(0, start, text[start : start + size]), *crowd[2:])[2])
            start += size
        assert torch.equal(torch.cat(parts), whole), sizes


class Products(TorchDispatchMode):
    """Notes the shapes of every operation that adds up products."""

    NAMES = ("mm", "matmul", "linear", "attention", "conv", "dot", "einsum")

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(part in name for part in self.NAMES):
            self.shapes.add((name, *(tuple(one.shape) for one in args if isinstance(one, torch.Tensor))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_every_product_has_the_same_shape_whatever_is_served(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path)
    settings = config(tmp_path)
    executor = executor_of(load_model(settings, CPU, packs_linears=False), settings)
    every = texts()
    seen = []
    for entries in (
        [entry(0, 0, every[0])],
        [entry(0, 150, (5,))],
        [entry(row, 0, text, LogitsNeed.LAST) for row, text in enumerate(every[1:8])],
        [entry(row, 9, (row,)) for row in range(64)],
    ):
        with Products() as products:
            logits(executor, *entries)
        seen.append(products.shapes)
    assert len(seen[0]) > 5
    assert not any("grouped" in str(name) for name, *_ in seen[0]), "a shape that says nothing of how rows are grouped"
    assert all(shapes == seen[0] for shapes in seen), [shapes ^ seen[0] for shapes in seen]


def test_rows_that_see_each_other_are_found_at_load(folder: Path) -> None:
    settings = config(folder)
    loaded = load_model(settings, CPU)
    executor = executor_of(loaded, settings)
    check_rows(executor)
    loaded.model.get_submodule("model.norm").register_forward_hook(lambda _m, _a, out: out + out.mean(1, keepdim=True))
    with pytest.raises(TierUnavailable, match="rows depend on each other"):
        check_rows(executor)
