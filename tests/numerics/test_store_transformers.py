"""Converted folders as transformers reads them: every weight has its place, and the real model speaks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from app.store.gguf_convert import convert_gguf
from tests.gguf_maker import small_model_fields, small_model_tensors, tokenizer_fields, write_gguf
from tests.store_models import default_model_folder

TINY: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_tiny.json").read_text())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("model_type", "tensors", "fields"),
    [
        ("llama", {"tied": True}, {}),
        (
            "llama",
            {"tied": False, "qkv_bias": True, "output_bias": True},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        ),
        ("qwen2", {"qkv_bias": True}, {}),
        ("qwen3", {"qk_norm": True, "tied": False}, {"attention.key_length": 16, "attention.value_length": 16}),
        ("gemma3", {"qk_norm": True, "post_norms": True}, {"attention.sliding_window": 8}),
    ],
)
def test_transformers_finds_every_weight(
    tmp_path: Path, model_type: str, tensors: dict[str, Any], fields: dict[str, object]
) -> None:
    metadata = small_model_fields(model_type, vocab_size=960, **fields) | tokenizer_fields(TINY, pre="qwen2")
    write_gguf(tmp_path / "small.gguf", metadata, small_model_tensors(vocab_size=960, **tensors))
    convert_gguf(tmp_path / "small.gguf", tmp_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_the_default_model_continues_sensibly() -> None:
    folder = default_model_folder()
    assert AutoConfig.from_pretrained(folder.path).max_position_embeddings == folder.max_model_len
    model: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    generated = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0].tolist()
    assert tokenizer.decode(generated[len(ids) :]).startswith(" Paris")
