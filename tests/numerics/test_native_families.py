"""Each family of the native table against transformers in float32 on a two-layer random model.

The bar: the largest logit error is at most twice what transformers itself has in bfloat16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tests.native_models import OTHER_FAMILIES, Hand, levels_here, load_native, prompt_ids, write_model

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama-mha-biases": {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
    "llama-mqa-untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "llama-head-32": {"head_dim": 32, "hidden_size": 208, "num_attention_heads": 4},
    "llama-head-96": {"head_dim": 96},
    "llama-head-128": {"head_dim": 128},
    "llama-rope-llama3": {"rope_scaling": _LLAMA3},
    "llama-rope-linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "qwen2-window-from-layer-1": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
        "sliding_window": 50, "max_window_layers": 1,
    },
    "llama-head-80": {"head_dim": 80},
    "llama-head-256": {"head_dim": 256, "num_attention_heads": 4},
    "llama-rope-yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    },
    "phi3-partial": {**OTHER_FAMILIES["phi3"], "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.75}},
    "gemma": {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"},
    **OTHER_FAMILIES,
}  # fmt: skip
NUM_TOKENS = 150


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def reference_logits(folder: Path, token_ids: tuple[int, ...], dtype: torch.dtype) -> NDArray[np.float32]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([token_ids])).logits[0]
    return logits.float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_close_to_float32_as_bfloat16_is(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, FAMILIES[family])
    token_ids = prompt_ids(NUM_TOKENS)
    exact = reference_logits(folder, token_ids, torch.float32)
    theirs = np.abs(reference_logits(folder, token_ids, torch.bfloat16) - exact).max()
    for level in levels_here():
        monkeypatch.setenv("HEADWATER_ISA", level)
        runner = load_native(folder)
        ours = np.abs(Hand(runner).prompt_logits(0, token_ids, (5, 3, 9)) - exact).max()
        runner.close()
        assert ours <= 2 * theirs, (level, ours, theirs)
