"""Random sizes that the kernels take: the same bits alone and in a crowd, and finite. `make sanitize` runs all of them
over kernels that watch their own memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.runner.native.families import HEAD_DIMS
from app.runner.native.precision import QUANTIZATIONS
from tests.native_models import GPT2, OTHER_FAMILIES, Hand, levels_here, load_native, prompt_ids, write_model

FEW = 4
MANY = 60
BLOCKS_A_ROW = 3


def random_changes(rng: np.random.Generator) -> dict[str, Any]:
    """Changes to the config of the test model: a family, odd vocabularies, uneven groups, sizes off the 64 columns."""
    kv_heads = int(rng.integers(1, 4))
    family = str(rng.choice(["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2"]))
    if family == "gpt2":
        heads, head_dim = int(rng.integers(1, 6)), int(rng.choice(HEAD_DIMS))
        return {**GPT2, "n_head": heads, "n_embd": heads * head_dim, "vocab_size": int(rng.integers(65, 700))}
    biases = {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))} if family == "llama" else {}
    return {
        **OTHER_FAMILIES.get(family, {"model_type": family}),
        "vocab_size": int(rng.integers(65, 700)),
        "hidden_size": 16 * int(rng.integers(1, 20)),
        "intermediate_size": 16 * int(rng.integers(1, 30)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * int(rng.integers(1, 6)),
        "head_dim": int(rng.choice(HEAD_DIMS)),
        "tie_word_embeddings": bool(rng.integers(2)),
        **({"sliding_window": int(rng.integers(1, 200))} if family in ("mistral", "phi3", "gemma2", "gemma3") else {}),
        **biases,
    }


@pytest.mark.parametrize("level", levels_here())
@pytest.mark.parametrize(
    "seed", [*range(FEW), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(FEW, MANY))]
)
def test_random_shapes(seed: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_ISA", level)
    rng = np.random.Generator(np.random.PCG64(seed))
    changes = random_changes(rng)
    quantization = [None, *QUANTIZATIONS][seed % (1 + len(QUANTIZATIONS))]
    native = load_native(write_model(tmp_path, changes, seed=seed), num_threads=1 + seed % 2, quantization=quantization)
    try:
        check_rows(Hand(native), rng, changes["vocab_size"])
    finally:
        native.close()


def check_rows(hand: Hand, rng: np.random.Generator, vocab_size: int) -> None:
    """Prompts in one step with each other, then again alone and cut in two."""
    lengths = rng.integers(2, 1 + 64 * BLOCKS_A_ROW, int(rng.integers(1, 8))).tolist()
    prompts = [prompt_ids(length, vocab_size=vocab_size, seed=length) for length in lengths]
    blocks = [tuple(range(BLOCKS_A_ROW * row, BLOCKS_A_ROW * (row + 1))) for row in range(len(prompts))]
    together = hand.logits(*(hand.entry(row, prompt, blocks[row]) for row, prompt in enumerate(prompts)))
    assert np.isfinite(together).all()
    for row, prompt in enumerate(prompts):
        again, cut = len(prompts) + row, int(rng.integers(1, len(prompt)))
        hand.run(hand.entry(again, prompt[:cut], blocks[row], prompt=prompt, sample=False))
        alone = hand.logits(hand.entry(again, prompt[cut:], blocks[row], start=cut, prompt=prompt))[0]
        assert np.array_equal(alone.view(np.uint32), together[row].view(np.uint32)), (lengths, row, cut)
