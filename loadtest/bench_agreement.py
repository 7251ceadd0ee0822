"""`python -m loadtest.bench_agreement`: how far greedy answers of each quantization go along with bfloat16's.

200 prompts of 48 tokens, cut from a public-domain text, 32 new tokens each, through the server on the native tier.
"""

import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from loadtest.faults.replicas import replicas
from loadtest.faults.server import DEFAULT_MODEL

TEXT = Path("tests/golden/coriolanus.txt")
NUM_PROMPTS, PROMPT_LEN, NUM_NEW = 200, 48, 32
QUANTIZATIONS = ("int8", "int8-safe", "int4")
NUM_AT_ONCE = 16
Answers = list[list[int]]


def answers(*flags: str) -> Answers:
    """The new token ids of every prompt, of a server with these flags."""
    with replicas(1, DEFAULT_MODEL, "--tier", "native", *flags) as (server,), httpx.Client(timeout=600) as http:
        asked = {"model": DEFAULT_MODEL, "prompt": TEXT.read_text(), "add_special_tokens": False}
        tokens = http.post(f"{server.url}/tokenize", json=asked).raise_for_status().json()["tokens"]
        prompts = [tokens[start : start + PROMPT_LEN] for start in range(0, NUM_PROMPTS * PROMPT_LEN, PROMPT_LEN)]

        def one(prompt: list[int]) -> list[int]:
            body = {"prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True}
            response = http.post(f"{server.url}/v1/completions", json=body | {"return_token_ids": True})
            return list(response.raise_for_status().json()["choices"][0]["token_ids"])

        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            return list(pool.map(one, prompts))


def agreement(exact: Answers, other: Answers) -> tuple[int, float, int]:
    """How many begin with the same token, tokens until the first other one (mean), how many are the same throughout."""
    lengths = [
        next((index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        for ours, theirs in zip(exact, other, strict=True)
    ]
    return sum(length > 0 for length in lengths), statistics.fmean(lengths), sum(n == NUM_NEW for n in lengths)


def main() -> None:
    """Print the table."""
    exact = answers()
    assert all(len(answer) == NUM_NEW for answer in exact)
    lines = ["| quantization | first token equal | tokens until the first other one | all equal |", "|---|---|---|---|"]
    for name in QUANTIZATIONS:
        num_first, length, num_equal = agreement(exact, answers("--quantization", name))
        lines.append(
            f"| `{name}` | {num_first} of {NUM_PROMPTS} | {length:.1f} of {NUM_NEW} | {num_equal} of {NUM_PROMPTS} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
