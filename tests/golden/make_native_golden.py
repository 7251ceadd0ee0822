"""Write tests/golden/native_tokens.json: `python -m tests.golden.make_native_golden`.

Unless a mode is added, run it only together with a raised KERNEL_EPOCH (or SAMPLER_EPOCH) and a line under
"Outputs changed" in the changelog. Levels that this CPU lacks keep what the file says.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from app.core.types import SamplingParams
from app.runner.native.levels import ISA_VARIABLE
from app.runner.native.loader import KERNEL_EPOCH
from app.runner.sampling import SAMPLER_EPOCH
from app.store import list_models
from tests.native_models import Hand, levels_here, load_native, prompt_ids, write_model

PATH = Path(__file__).with_name("native_tokens.json")
NUM_TOKENS = 48
PROMPT = prompt_ids(150)
MODES = ("bfloat16", "int8", "int8-safe", "int4")


CATALOGUE_MODEL = "smollm2-135m-instruct-q4"
SENTENCE = (504, 3575, 282, 4649, 314)
"""The capital of France is"""


def default_model() -> Path | None:
    """The catalogue model's folder, where it is in the cache."""
    return next((model.path for model in list_models() if model.name == CATALOGUE_MODEL), None)


def trained_tokens(folder: Path) -> list[int]:
    """Greedy tokens of trained weights after SENTENCE, at the forced level."""
    runner = load_native(folder)
    try:
        return _tokens(Hand(runner), 0, SamplingParams(seed=1, max_tokens=64, temperature=0.0), prompt=SENTENCE)
    finally:
        runner.close()


def golden_tokens(folder: Path, quantization: str) -> dict[str, Any]:
    """Greedy and seeded tokens of a 2-layer model after a prompt of 150 tokens, at the forced level."""
    runner = load_native(folder, quantization=None if quantization == "bfloat16" else quantization)
    try:
        return {
            "greedy": _tokens(Hand(runner), 0, SamplingParams(seed=1, max_tokens=64, temperature=0.0)),
            "seeded": _tokens(Hand(runner), 1, SamplingParams(seed=1, max_tokens=64, temperature=1.0, top_p=0.95)),
        }
    finally:
        runner.close()


def _tokens(hand: Hand, row: int, params: SamplingParams, *, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    blocks = tuple(range(4 * row, 4 * row + 4))
    token_ids, start = prompt, 0
    made: list[int] = []
    for _ in range(NUM_TOKENS):
        (result,) = hand.run(hand.entry(row, token_ids, blocks, start=start, params=params, prompt=prompt))
        start += len(token_ids)
        token_ids = result.token_ids
        made.extend(token_ids)
    return made


def main() -> None:
    """Recompute the levels of this CPU."""
    known = json.loads(PATH.read_text())["tokens"] if PATH.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        for level in levels_here():
            os.environ[ISA_VARIABLE] = level
            known[level] = {mode: golden_tokens(folder, mode) for mode in MODES}
            trained = default_model()
            if trained is None:
                raise SystemExit(f"{CATALOGUE_MODEL} is not in the cache: run `headwater pull {CATALOGUE_MODEL}`")
            known[level][CATALOGUE_MODEL] = trained_tokens(trained)
    golden = {"kernel_epoch": KERNEL_EPOCH, "sampler_epoch": SAMPLER_EPOCH, "tokens": known}
    PATH.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
