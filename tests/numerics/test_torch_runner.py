"""The torch runner beside its families: what it refuses, packing, static shapes, poisoned rows, sampling."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.core.plan import LogitsNeed, PlanEntry, RowStart, StepPlan
from app.core.types import EngineRequest, FinishReason, SamplingParams
from app.runner.base import TierUnavailable
from app.runner.torch import cuda_tier
from app.runner.torch.any_tier import load
from app.runner.torch.check import probe_model
from app.runner.torch.executor import Executor
from app.runner.torch.kv_cache import KVCache, LayerShape
from app.runner.torch.linear import PackedLinear, pack_linears, packing_works
from app.runner.torch.loading import choose_dtype, load_model, read_config
from app.runner.torch.packing import ChunkPacker, Packer, context_bucket
from app.runner.torch.rows import RowPacker
from tests.numerics.driver import Driver, greedy
from tests.numerics.families import CONFIGS, VOCAB, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("llama")
    make_model("llama", path)
    return path


def config(folder: Path, **fields: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "model_dir": str(folder),
        "dtype": "float32",
        "num_threads": 1,
        "block_size": 8,
        "max_num_seqs": 16,
        "num_kv_blocks": 64,
        "max_num_batched_tokens": 64,
    }
    return EngineConfig(**(defaults | fields))


# What is refused


def with_config(folder: Path, fields: dict[str, Any]) -> EngineConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return config(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "falcon"}, "lets nobody bring an attention for 'falcon'"),
        ({"model_type": "bloom"}, "lets nobody bring an attention for 'bloom'"),
        ({"model_type": "mamba"}, "lets nobody bring an attention for 'mamba'"),
        ({"model_type": "stablelm"}, "lets nobody bring an attention for 'stablelm'"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "no causal language model for 'vit'"),
        ({"model_type": "no_such_model"}, "does not read its config.json"),
        ({"model_type": "llama4_text"}, "chunked_attention"),
        ({"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, r"\['conv'\]"),
        ({"model_type": "phimoe", "sliding_window": 64}, "does not tell its attention its sliding window of 64"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TierUnavailable, match=reason):
        load(with_config(tmp_path, fields))


def test_settings_that_contradict_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="--max-model-len 257 is more than the model's context of 256"):
        load(config(folder, max_model_len=257))
    with pytest.raises(ConfigurationError, match="float16 is slow"):
        load(config(folder, dtype="float16"))
    with pytest.raises(TierUnavailable, match="does not quantize"):
        load(config(folder, quantization="int8"))
    with pytest.raises(TierUnavailable, match="the device asked for is the CPU"):
        cuda_tier.load(config(folder, device="cpu"))


def test_weights_are_never_unpickled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"model.embed_tokens.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="do not load"):
        load(config(tmp_path))


def test_an_unlisted_family_is_checked_at_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, OlmoConfig

    shape = OlmoConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    assert load(config(tmp_path)).info.vocab_size == 99


def test_a_model_that_calls_its_attention_otherwise_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, DiffLlamaConfig

    shape = DiffLlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    with pytest.raises(TierUnavailable, match="called the attention of 2 layers, 4 times"):
        load(config(tmp_path))


def test_lengths_that_change_the_rotation_cut_the_context(tmp_path: Path) -> None:
    from app.runner.torch.families import context_length

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    fields = {
        "model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512,
        "original_max_position_embeddings": 128, "rope_scaling": rope, "pad_token_id": 0, "vocab_size": 99,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert context_length(read_config(tmp_path)) == 128


def test_dtype_is_the_checkpoint_s_where_the_machine_is_fast_with_it(folder: Path) -> None:
    cpu = torch.device("cpu")
    model_config = read_config(folder)
    assert choose_dtype("auto", model_config, cpu)[0] == torch.float32
    model_config.dtype = torch.float16
    assert choose_dtype("auto", model_config, cpu)[0] == torch.float32
    assert choose_dtype("auto", model_config, torch.device("cuda"))[0] == torch.float16
    with pytest.raises(ConfigurationError, match="unknown dtype 'int3'"):
        choose_dtype("int3", model_config, cpu)


# Linear layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_packed_layers_compute_what_they_replace(dtype: torch.dtype, kind: str) -> None:
    assert packing_works(dtype), "this machine's torch has no packed linear: the runner falls back to F.linear"
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(48, 80, bias=kind == "linear") if kind != "conv1d" else Conv1D(80, 48)
    parent = nn.Sequential(layer.to(dtype))
    inputs = [torch.randn(*shape, 48).to(dtype) for shape in ((0,), (1,), (5,), (1, 1), (1, 0), (2, 3))]
    with torch.inference_mode():
        expected = [parent(x) for x in inputs]
        assert pack_linears(parent, dtype) == 1
        assert isinstance(parent[0], PackedLinear)
        for x, other in zip(inputs, expected, strict=True):
            assert parent(x).shape == other.shape
            assert torch.allclose(parent(x).float(), other.float(), atol=1e-5 if dtype == torch.float32 else 0.05)


def test_a_packed_row_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        parent = nn.Sequential(nn.Linear(2048, 96).to(dtype))
        x = torch.randn(64, 2048).to(dtype)
        with torch.inference_mode():
            pack_linears(parent, dtype)
            whole = parent(x)
            for size in (1, 2, 3, 7, 33):
                assert torch.equal(parent(x[:size]), whole[:size])


# Executor and packing


def make_executor(folder: Path, *, sizes: tuple[int, ...] = ()) -> Executor:
    """With chunks as they come, or rows in passes of `sizes`."""
    loaded = load_model(config(folder), torch.device("cpu"))
    layers = tuple(LayerShape(index, 2, 16, 16) for index in range(2))
    cache = KVCache(layers, num_blocks=32, block_size=8, dtype=torch.float32, device=torch.device("cpu"))
    packer: Packer = ChunkPacker(cache, device=torch.device("cpu"))
    if sizes:
        packer = RowPacker(cache, device=torch.device("cpu"), sizes=sizes, max_model_len=256)
    return Executor(loaded.model, head=None, kv_cache=cache, packer=packer, vocab_size=VOCAB)


def entry(row: int, start: int, token_ids: tuple[int, ...], table: tuple[int, ...], need: LogitsNeed) -> PlanEntry:
    return PlanEntry(row, start, token_ids, 0, table, 0, need, False)


PLANS = (
    StepPlan(
        1,
        (
            entry(0, 0, tuple(range(3, 20)), (4, 1, 7), LogitsNeed.LAST),
            entry(1, 0, (9,), (5,), LogitsNeed.ALL),
            entry(2, 0, tuple(range(5)), (2,), LogitsNeed.NONE),
        ),
    ),
    StepPlan(
        2,
        (
            entry(1, 1, (9, 8, 7), (5,), LogitsNeed.ALL),
            entry(0, 17, (6,), (4, 1, 7, 30), LogitsNeed.LAST),
            entry(2, 5, (6,), (2,), LogitsNeed.LAST),
        ),
    ),
    StepPlan(3, (entry(2, 6, (6, 5), (2,), LogitsNeed.NONE),)),
    StepPlan(4, (entry(2, 8, (6,), (2, 3), LogitsNeed.LAST),)),
)


@pytest.mark.parametrize("sizes", [(8,), (1, 2, 4, 32)])
def test_rows_bring_the_logits_of_chunks(folder: Path, sizes: tuple[int, ...]) -> None:
    chunks, rows = make_executor(folder), make_executor(folder, sizes=sizes)
    for plan in PLANS:
        one, other = chunks.run(plan), rows.run(plan)
        assert one.spans == other.spans
        assert torch.allclose(one.rows(slice(None)), other.rows(slice(None)), atol=1e-5)


def test_logits_come_in_the_plan_s_order(folder: Path) -> None:
    executor = make_executor(folder)
    spans = [executor.run(plan).spans for plan in PLANS]
    assert spans[0] == (slice(0, 1), slice(1, 2), slice(2, 2))
    assert spans[1] == (slice(0, 3), slice(3, 4), slice(4, 5))
    assert spans[2] == (slice(0, 0),)


def test_context_buckets() -> None:
    assert [context_bucket(size) for size in (1, 2, 3, 4, 5, 7, 8, 9, 13, 17)] == [1, 2, 3, 4, 6, 8, 8, 12, 16, 24]


def test_every_family_s_head_splits_off(tmp_path: Path) -> None:
    """Where it did not, prompt logprobs would still be right and take more memory."""
    for family in CONFIGS:
        make_model(family, tmp_path / family)
        probed = probe_model(load_model(config(tmp_path / family), torch.device("cpu")).model, torch.device("cpu"))
        assert probed.head is not None, family


# Rows


def test_a_poisoned_row_fails_alone_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    """A token whose embedding is NaN: its row ends with an error; rows beside and after it are whole."""
    model = make_model("llama", tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = math.nan
    model.save_pretrained(tmp_path)
    healthy = [[3, 4, 5, 6, 7, 8, 9], [10] * 20]
    expected = Driver(load(config(folder))).run(healthy, greedy(12))
    runner = load(config(tmp_path))
    driver = Driver(runner, num_kv_blocks=12)
    for index, prompt in enumerate([healthy[0], [50] * 30, healthy[1]]):
        request = EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), params=greedy(12))
        assert driver.scheduler.add(request, 0.0) is None
    got: dict[str, list[int]] = {"0": [], "2": []}
    errors = {}
    while driver.scheduler.has_work:
        plan = driver.scheduler.schedule(0.0)
        assert plan is not None
        for output in driver.scheduler.apply(plan, runner.sample(plan, runner.forward(plan)), 0.0):
            if output.finish_reason is FinishReason.ERROR:
                errors[output.request_id] = output.error
            else:
                got[output.request_id].extend(output.token_ids)
    assert list(errors) == ["1"]
    assert "not finite" in str(errors["1"])
    assert list(got.values()) == expected
    assert Driver(runner, num_kv_blocks=12).run(healthy, greedy(12)) == expected  # in the blocks it left


def test_sampled_rows_do_not_depend_on_their_company(folder: Path) -> None:
    runner = load(config(folder))
    prompts = [[3, 4, 5], [6] * 19, [7, 8]]
    params = [
        SamplingParams(seed=1, max_tokens=10, ignore_eos=True, num_logprobs=3),
        SamplingParams(seed=2, max_tokens=10, ignore_eos=True, top_p=0.8, temperature=1.3, presence_penalty=0.5),
        SamplingParams(seed=3, max_tokens=10, ignore_eos=True, top_k=7, repetition_penalty=1.2, bad_words=((9,),)),
    ]
    together = Driver(runner, budget=7).run(prompts, params)
    alone = [Driver(runner).run([prompt], [one])[0] for prompt, one in zip(prompts, params, strict=True)]
    assert together == alone
    repeated = Driver(runner).run([prompts[0]] * 2, [params[0]] * 2)
    assert repeated == [alone[0]] * 2


def test_logprobs_of_output_and_prompt(folder: Path) -> None:
    runner = load(config(folder))
    params = SamplingParams(
        seed=0, max_tokens=4, temperature=0.0, num_logprobs=2, num_prompt_logprobs=1, ignore_eos=True
    )
    prompt = list(range(3, 24))
    outputs = Driver(runner, budget=5).run_outputs([prompt], params)[0]
    prompt_logprobs = [one for output in outputs for one in output.prompt_logprobs]
    logprobs = [one for output in outputs for one in output.logprobs]
    assert (len(prompt_logprobs), len(logprobs)) == (len(prompt) - 1, 4)
    assert all(one.rank == 1 and one.logprob == one.top_logprobs[0] for one in logprobs)
    assert all(len(one.top_logprobs) == 1 and one.logprob <= one.top_logprobs[0] for one in prompt_logprobs)


def test_a_closed_runner_says_so(folder: Path) -> None:
    runner = load(config(folder))
    runner.close()
    start = RowStart("r", greedy(1), (3,), ())
    with pytest.raises(RuntimeError, match="closed"):
        runner.forward(StepPlan(1, (PlanEntry(0, 0, (3,), 0, (0,), 1, LogitsNeed.LAST, True, start),)))
