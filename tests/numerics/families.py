"""Tiny random models of the families that the torch runner claims, made with transformers, and their reference."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB = 211
WINDOW = 16
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama mqa tied": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0} | _SLIDING),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16} | _SLIDING),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "cohere": ("CohereConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2} | _SLIDING),
}
PROMPT_LENGTHS = (5, 13, 37)
NUM_TOKENS = 16


@dataclass(frozen=True)
class Reference:
    """Greedy outputs of `transformers.generate` in float32, one prompt at a time."""

    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    margins: list[list[float]]
    """Distance of the two best logits at each output token."""
    prompt_logprobs: list[float]
    """Of the last prompt's tokens after the first."""


def make_reference(family: str, folder: Path) -> Reference:
    """A saved model and what it says."""
    model = make_model(family, folder)
    model.generation_config.eos_token_id = None  # answers go on to their length
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    outputs, margins = [], []
    for prompt in prompts:
        generated = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        outputs.append(generated.sequences[0, len(prompt) :].tolist())
        best = torch.cat(generated.logits).topk(2).values
        margins.append((best[:, 0] - best[:, 1]).tolist())
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompts[-1]])).logits[0].log_softmax(-1)
    scored = [logprobs[at, token_id].item() for at, token_id in enumerate(prompts[-1][1:])]
    return Reference(folder, prompts, outputs, margins, scored)


def make_model(family: str, folder: Path) -> Any:
    """Random weights, saved to `folder`, loaded with transformers' own attention."""
    name, fields = CONFIGS[family]
    config_class = getattr(importlib.import_module("transformers"), name)
    torch.manual_seed(0)
    config = config_class(**(_COMMON | fields))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()
