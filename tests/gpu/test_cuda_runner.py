"""The cuda tier on a real device. Skips, saying so, where no NVIDIA device answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.core.plan import RowStart
from app.core.types import SamplingParams
from app.runner.sampling import RowSampler
from app.runner.sampling.philox import gumbel_noise as numpy_noise
from app.runner.sampling.philox import split
from app.runner.torch.cuda_tier import load
from app.runner.torch.loading import load_model
from app.runner.torch.sampling.batch import DeviceSampler, DrawRequest
from app.runner.torch.sampling.draw import DrawKind, draw, fields_of
from app.runner.torch.sampling.philox import gumbel_noise
from app.store import resolve
from tests.numerics import test_torch_deterministic as deterministic
from tests.numerics.driver import Driver, assert_same, greedy
from tests.numerics.families import CONFIGS, NUM_TOKENS, make_model, make_reference
from tests.unit.sampling_cases import EOS, NUM_DRAWS, load_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: no NVIDIA device answers here"),
]

REFERENCE = json.loads((Path(__file__).parent.parent / "data" / "reference_ids.json").read_text(encoding="utf-8"))


def config(folder: Path, **fields: object) -> EngineConfig:
    defaults: dict[str, object] = {"model_dir": str(folder), "dtype": "float32", "max_num_seqs": 64}
    return EngineConfig(**(defaults | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", CONFIGS)
def test_families_equal_transformers(family: str, tmp_path: Path) -> None:
    reference = make_reference(family, tmp_path)  # on the CPU
    runner = load(config(tmp_path, block_size=8, num_kv_blocks=64))
    chunked = Driver(runner, budget=5)
    for what in ("batched in small chunks", "with prefix hits"):
        outputs = chunked.run(reference.prompts, greedy(NUM_TOKENS))
        for got, expected, margins in zip(outputs, reference.outputs, reference.margins, strict=True):
            assert_same(got, expected, margins, what=f"{family} {what}")


def test_the_default_model_equals_transformers() -> None:
    try:
        folder = resolve(REFERENCE["model"], report=print).path
    except ConfigurationError as error:
        pytest.skip(f"NOT RUN, the default model cannot be had here: {error}")
    runner = load(config(folder))
    entries = REFERENCE["prompts"]
    outputs = Driver(runner, budget=128, max_num_seqs=32).run(
        [entry["prompt"] for entry in entries], greedy(REFERENCE["num_tokens"])
    )
    for got, entry in zip(outputs, entries, strict=True):
        margins = [entry["margins"].get(str(index), 1.0) for index in range(len(got))]
        assert_same(got, entry["output"], margins, what=repr(entry["text"][:40]))


def test_noise_is_the_definition_s() -> None:
    seeds, positions = [0, 2**64 - 1, 2**63 + 12345], [0, 2**31 + 7, 5]
    words = [torch.tensor([split(one) for one in values]).T.cuda() for values in (seeds, positions)]
    noise = gumbel_noise((words[0], words[1]), 1003).cpu().numpy()
    for row, seed, position in zip(noise, seeds, positions, strict=True):
        assert row == pytest.approx(numpy_noise(seed, position, 1003), rel=1e-4, abs=1e-4)


def test_sampling_cases_draw_the_committed_tokens() -> None:
    for case in load_cases():
        sampler = RowSampler(case.start(), case.vocab_size, EOS)
        logits = torch.from_numpy(np.stack([case.logits()])).cuda()
        first = len(case.prompt) + len(case.output)
        device_sampler = DeviceSampler((1,), logits.device)
        drawn = [
            device_sampler.draw(logits, [DrawRequest(sampler, first + step)])[0].token_id for step in range(NUM_DRAWS)
        ]
        assert tuple(drawn) == case.expected_gumbel, case.name


def test_sampled_rows_repeat(tmp_path: Path) -> None:
    reference = make_reference("llama", tmp_path)
    runner = load(config(tmp_path, block_size=8, num_kv_blocks=64))
    params = SamplingParams(seed=3, max_tokens=12, ignore_eos=True, top_p=0.9, num_logprobs=3)
    first, second = (Driver(runner).run(reference.prompts, params) for _ in range(2))
    assert first == second


def test_masks_forbid_on_the_device() -> None:
    vocab_size = 301
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((3, vocab_size), generator=generator)
    allowed = [np.arange(vocab_size) % 7 == 3, np.arange(vocab_size) == 300, None]
    masks = [None if a is None else np.packbits(np.resize(a, 320), bitorder="little").view(np.int32) for a in allowed]
    starts = RowStart("r", SamplingParams(seed=5, max_tokens=9, temperature=0.0), (1,), ())
    requests = [DrawRequest(RowSampler(starts, vocab_size, ()), 1, mask) for mask in masks]
    drawn = [one.token_id for one in DeviceSampler((3,), torch.device("cuda")).draw(logits.cuda(), requests)]
    expected = [row if a is None else np.where(a, row, -np.inf) for row, a in zip(logits.numpy(), allowed, strict=True)]
    assert drawn == [int(row.argmax()) for row in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_have_the_same_bits_in_the_deterministic_mode(dtype: str, tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    settings = deterministic.config(tmp_path, dtype=dtype)
    executor = deterministic.executor_of(load_model(settings, torch.device("cuda")), settings)
    deterministic.check_batches(executor)
    deterministic.check_chunks(executor)


def test_a_draw_is_captured_in_a_graph() -> None:
    """Captured over rows of one content, replayed over another."""
    kind = DrawKind(has_filters=True, has_noise=True, num_top=2)
    params = [SamplingParams(seed=row, max_tokens=1, top_p=0.9, top_k=20) for row in range(8)]
    logits = torch.randn((8, 1000), device="cuda")
    fields = torch.from_numpy(fields_of(params, [1] * 8, 8)).cuda()
    draw(logits, logits, fields, kind)  # whatever is set up at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw(logits, logits, fields, kind)
    for position in range(2, 6):
        logits.copy_(torch.randn_like(logits))
        fields.copy_(torch.from_numpy(fields_of(params, [position] * 8, 8)))
        graph.replay()
        assert torch.equal(drawn, draw(logits, logits, fields, kind))
