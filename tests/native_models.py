"""Small models of the llama shape for tests of the native tier, and a driver that runs plans by hand.

Weights come from numpy's PCG64, whose numbers are fixed by its seed on every machine: golden tokens can
be pinned to them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from app.core.config import EngineConfig
from app.core.plan import LogitsNeed, PlanEntry, RowResult, RowStart, StepPlan
from app.core.types import SamplingParams
from app.runner.native import load
from app.runner.native.levels import LEVELS, choose_level
from app.runner.native.mapping import Mapping as SharedMapping
from app.runner.native.runner import NativeRunner

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 515,
    "hidden_size": 192,
    "intermediate_size": 272,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
GREEDY = SamplingParams(seed=7, max_tokens=64, temperature=0.0)
SEEDED = SamplingParams(seed=7, max_tokens=64, temperature=1.0)


def levels_here() -> list[str]:
    """Names of the ISA levels that this CPU has."""
    best = choose_level().name
    names = [level.name for level in LEVELS]
    return names[names.index(best) :]


def makes_large_pages() -> bool:
    """Whether this kernel lets memory outlive an engine (Linux 6.1)."""
    descriptor = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        return SharedMapping(descriptor, 1, is_writable=True).enlarge_pages(0, 1)
    finally:
        os.close(descriptor)


GPT2: Mapping[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 515,
    "n_embd": 192,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 512,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 0,
}
_GEMMA: Mapping[str, Any] = {
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 48,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"],
}
OTHER_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0, "sliding_window": None},
    "gemma2": {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **_GEMMA, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], **_GEMMA,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt2": GPT2,
    "mistral-window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 70},
}  # fmt: skip
"""Changes to LLAMA; of gpt2, the whole."""


def write_model(folder: Path, changes: Mapping[str, Any] | None = None, *, seed: int = 0) -> Path:
    """A model folder: LLAMA with `changes` to its config, and seeded random weights in float32."""
    changes = changes or {}
    config = dict(changes) if changes.get("model_type") == "gpt2" else {**LLAMA, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors = {name: _values(rng, name, shape) for name, shape in _tensor_shapes(config).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.06)
    return values + np.float32(1.0) if "norm" in name else values


def _tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if config["model_type"] == "gpt2":
        return _gpt2_shapes(config)
    hidden, dim, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    q_size, kv_size = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        projections = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        if config["model_type"] == "phi3":
            projections = {
                "self_attn.qkv_proj": (q_size + 2 * kv_size, hidden),
                "self_attn.o_proj": (hidden, q_size),
                "mlp.gate_up_proj": (2 * inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
        biased = _biased(config)
        for name, shape in projections.items():
            shapes[f"{layer}{name}.weight"] = shape
            if name.split(".")[1] in biased:
                shapes[f"{layer}{name}.bias"] = shape[:1]
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config["model_type"] in ("gemma2", "gemma3_text"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in norms:
            shapes[f"{layer}{name}.weight"] = (hidden,)
        if config["model_type"] in ("qwen3", "gemma3_text"):
            shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (dim,)
    return shapes


def _gpt2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vectors = config["n_embd"], {"ln_f"}
    shapes: dict[str, tuple[int, ...]] = {"wte": (config["vocab_size"], hidden), "wpe": (config["n_positions"], hidden)}
    for index in range(config["n_layer"]):
        layer = f"h.{index}."
        shapes[layer + "attn.c_attn"] = (hidden, 3 * hidden)
        shapes[layer + "attn.c_proj"] = (hidden, hidden)
        shapes[layer + "mlp.c_fc"] = (hidden, 4 * hidden)
        shapes[layer + "mlp.c_proj"] = (4 * hidden, hidden)
        vectors |= {layer + "ln_1", layer + "ln_2"}
    tensors = {f"transformer.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"transformer.{name}.weight": (hidden,) for name in sorted(vectors)}
    tensors |= {f"transformer.{name}.bias": (hidden,) for name in sorted(vectors)}
    return tensors | {f"transformer.{name}.bias": shape[1:] for name, shape in shapes.items() if ".c_" in name}


def _biased(config: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    if config.get("attention_bias") or config["model_type"] == "qwen2":
        names |= {"q_proj", "k_proj", "v_proj"}
    if config.get("attention_bias"):
        names.add("o_proj")
    if config.get("mlp_bias"):
        names |= {"gate_proj", "up_proj", "down_proj"}
    return names


def load_native(folder: Path, **settings: Any) -> NativeRunner:
    """A runner with a fixed budget and a pool of 64 blocks, unless told otherwise."""
    defaults: dict[str, Any] = {
        "num_kv_blocks": 64,
        "max_num_batched_tokens": 512,
        "num_threads": 1,
        "eos_token_ids": (0,),
    }
    return load(EngineConfig(model_dir=str(folder), **{**defaults, **settings}))


def prompt_ids(count: int, *, vocab_size: int = LLAMA["vocab_size"], seed: int = 0) -> tuple[int, ...]:
    """Seeded random token ids."""
    return tuple(np.random.Generator(np.random.PCG64(seed)).integers(1, vocab_size, count).tolist())


@dataclass
class Hand:
    """Runs plans made by hand and keeps what came out."""

    runner: NativeRunner
    step_id: int = 0
    started: set[int] = field(default_factory=set)

    def entry(
        self,
        row: int,
        token_ids: Sequence[int],
        blocks: Sequence[int],
        *,
        start: int = 0,
        params: SamplingParams = SEEDED,
        logits: LogitsNeed = LogitsNeed.LAST,
        sample: bool = True,
        prompt: Sequence[int] | None = None,
    ) -> PlanEntry:
        """One entry; a row seen for the first time gets its start."""
        first = row not in self.started
        self.started.add(row)
        prompt_token_ids = tuple(token_ids if prompt is None else prompt)
        return PlanEntry(
            row=row,
            start=start,
            token_ids=tuple(token_ids),
            num_draft_tokens=0,
            block_table=tuple(blocks),
            num_new_blocks=len(blocks) if first else 0,
            logits=logits,
            sample=sample,
            start_row=RowStart(str(row), params, prompt_token_ids, ()) if first else None,
        )

    def run(self, *entries: PlanEntry) -> tuple[RowResult, ...]:
        """Forward and sample one step."""
        plan = StepPlan(step_id=self.step_id, entries=entries)
        self.step_id += 1
        return self.runner.sample(plan, self.runner.forward(plan)).rows

    def logits(self, *entries: PlanEntry) -> NDArray[np.float32]:
        """Raw logits of the sampled entries of one step, (num_entries, vocab_size)."""
        plan = StepPlan(step_id=self.step_id, entries=entries)
        self.step_id += 1
        logits = self.runner.forward(plan).wanted.logits
        return logits[:, : self.runner.info.vocab_size].copy()

    def prompt_logits(self, row: int, token_ids: Sequence[int], blocks: Sequence[int]) -> NDArray[np.float32]:
        """Raw logits at every position of a prompt, (len(token_ids), vocab_size), a token a step."""
        parts = [
            self.logits(self.entry(row, token_ids[i : i + 1], blocks, start=i, prompt=token_ids))
            for i in range(len(token_ids))
        ]
        return np.concatenate(parts)
