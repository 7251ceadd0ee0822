"""The table of sampling cases: one row's parameters and the tokens that must be drawn from known logits.

`python -m tests.unit.sampling_cases` writes the expected ids anew. Do that only together with a new
SAMPLER_EPOCH: the ids are what users' seeds mean.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.core.plan import RowStart
from app.core.types import SamplingParams
from app.runner.sampling import RowSampler
from app.runner.sampling.draw import draw_gumbel

TABLE = Path(__file__).parent.parent / "data" / "sampling_cases.json"
NUM_DRAWS = 6
EOS = (2,)


class Case(msgspec.Struct, frozen=True):
    """Draws from the same logits at NUM_DRAWS positions, each token observed before the next."""

    name: str
    vocab_size: int
    params: dict[str, Any]
    prompt: tuple[int, ...] = (5, 6, 7)
    output: tuple[int, ...] = ()
    expected: tuple[int, ...] = ()
    """By inverse CDF."""
    expected_gumbel: tuple[int, ...] = ()

    def start(self) -> RowStart:
        fields = {"seed": 7, "max_tokens": 99} | self.params
        params = msgspec.convert(fields, SamplingParams)
        return RowStart(self.name, params, self.prompt, self.output)

    def logits(self) -> NDArray[np.float32]:
        """(vocab_size,) multiples of 1/16 between -8 and 8: many ties, exact in every arithmetic."""
        ids = np.arange(self.vocab_size, dtype=np.uint64)
        mixed = (ids * np.uint64(2654435761) + np.uint64(self.vocab_size)) & np.uint64(0xFFFFFFFF)
        mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
        return ((mixed >> np.uint64(24)).astype(np.float32) - np.float32(128)) / np.float32(16)


def load_cases() -> list[Case]:
    return msgspec.json.decode(TABLE.read_bytes(), type=list[Case])


def draws(case: Case) -> tuple[int, ...]:
    sampler = RowSampler(case.start(), case.vocab_size, EOS)
    first = len(case.prompt) + len(case.output)
    return tuple(sampler.sample_row(case.logits(), first + i)[0] for i in range(NUM_DRAWS))


def gumbel_draws(case: Case) -> tuple[int, ...]:
    sampler = RowSampler(case.start(), case.vocab_size, EOS)
    drawn = []
    for position in range(len(case.prompt) + len(case.output), len(case.prompt) + len(case.output) + NUM_DRAWS):
        drawn.append(draw_gumbel(sampler.changes().apply(case.logits()), sampler.params, position))
        sampler.observe(drawn[-1])
    return tuple(drawn)


CASES: list[dict[str, Any]] = [
    {"name": "greedy", "vocab_size": 1000, "params": {"temperature": 0.0}},
    {"name": "greedy below the smallest temperature", "vocab_size": 1000, "params": {"temperature": 1e-6}},
    {"name": "plain", "vocab_size": 1000, "params": {}},
    {"name": "plain, another seed", "vocab_size": 1000, "params": {"seed": 2**64 - 1}},
    {"name": "plain, vocabulary of no round size", "vocab_size": 50257, "params": {}},
    {"name": "tiny vocabulary", "vocab_size": 3, "prompt": [0, 1], "params": {"temperature": 4.0}},
    {"name": "hot", "vocab_size": 1000, "params": {"temperature": 2.0}},
    {"name": "cold", "vocab_size": 1000, "params": {"temperature": 0.05}},
    {"name": "top_k 1", "vocab_size": 1000, "params": {"top_k": 1}},
    {"name": "top_k through a tie", "vocab_size": 1000, "params": {"top_k": 6, "temperature": 3.0}},
    {"name": "top_k beyond the vocabulary", "vocab_size": 100, "params": {"top_k": 5000}},
    {"name": "top_p", "vocab_size": 1000, "params": {"top_p": 0.5}},
    {"name": "top_p tiny", "vocab_size": 1000, "params": {"top_p": 1e-9}},
    {"name": "top_p wide and hot", "vocab_size": 50257, "params": {"top_p": 0.97, "temperature": 50.0}},
    {"name": "min_p", "vocab_size": 1000, "params": {"min_p": 0.3, "temperature": 2.0}},
    {"name": "min_p 1", "vocab_size": 1000, "params": {"min_p": 1.0}},
    {
        "name": "min_p, top_k, top_p together",
        "vocab_size": 50257,
        "params": {"min_p": 0.05, "top_k": 200, "top_p": 0.8, "temperature": 1.5},
    },
    {"name": "repetition greedy", "vocab_size": 1000, "params": {"temperature": 0.0, "repetition_penalty": 1.3}},
    {"name": "presence greedy", "vocab_size": 1000, "params": {"temperature": 0.0, "presence_penalty": 1.0}},
    {"name": "frequency greedy", "vocab_size": 100, "params": {"temperature": 0.0, "frequency_penalty": 0.7}},
    {
        "name": "penalties, drawn, with output from before",
        "vocab_size": 1000,
        "output": [8, 9, 9, 9],
        "params": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5, "top_k": 40},
    },
    {
        "name": "logit_bias",
        "vocab_size": 1000,
        "params": {"temperature": 0.0, "logit_bias": [[17, 100.0], [18, 100.0], [19, -100.0]]},
    },
    {"name": "allowed", "vocab_size": 1000, "params": {"allowed_token_ids": [900, 3, 4, 5, 3]}},
    {
        "name": "allowed, greedy, min_tokens",
        "vocab_size": 1000,
        "params": {"temperature": 0.0, "allowed_token_ids": [2, 11, 12], "min_tokens": 3, "stop_token_ids": [12]},
    },
    {
        "name": "bad words of one and two tokens",
        "vocab_size": 20,
        "params": {
            "temperature": 0.0,
            "allowed_token_ids": [1, 3, 4, 8, 9],
            "bad_words": [[3], [4, 4], [4, 1], [8, 4, 8], [4, 8, 4]],
        },
    },
]


def make() -> None:
    cases = [msgspec.convert(case, Case) for case in CASES]
    table = [
        msgspec.to_builtins(msgspec.structs.replace(case, expected=draws(case), expected_gumbel=gumbel_draws(case)))
        for case in cases
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("[\n" + ",\n".join(json.dumps(case) for case in table) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    make()
