"""How evaluation harnesses score: `echo`, `logprobs` 1, `max_tokens` 1, token ids. Held to transformers in float32.

A harness sends context and continuation as one list of ids and sums `token_logprobs[len(context):-1]`; it takes the
continuation for the greedy one where each of these equals the largest of its `top_logprobs`, so the two lists must
hold the very same floats.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.serving import free_port, started, wait_ready

MODEL = Path(__file__).parents[2] / "models" / "rill-stories-3m"
BOS = 1
CONTEXTS = [
    *("SELECT name FROM", "SELECT count(*) FROM orders WHERE", "-- the newest order of each customer\nSELECT"),
    *("CREATE TABLE users (", "INSERT INTO t VALUES (1,", "How many rows has the table", "UPDATE a SET b ="),
    *("DELETE FROM logs WHERE age >", "SELECT a, b, sum(c) FROM t GROUP BY a, b HAVING", "你好"),
]
CONTINUATIONS = [
    *(" customers", " x = 1", " id INTEGER PRIMARY KEY", " 'it''s', NULL)", " orders?", " b + 1;", " 30;"),
    *(" sum(c) > 10 ORDER BY a;", " 世界 🌍", " the"),
]
PAIRS = list(itertools.product(CONTEXTS, CONTINUATIONS))


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    port, log = free_port(), tmp_path_factory.mktemp("evaluation") / "serve.log"
    flags = ["--tier", "any", "--dtype", "float32", "--kv-cache-gib", "0.05", "--num-threads", "1"]
    with started(log, "-m", "app.cli", "serve", str(MODEL), "--port", str(port), *flags) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


def encode(http: httpx.Client, text: str) -> list[int]:
    answer = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    token_ids: list[int] = answer["tokens"]
    return token_ids


def score(http: httpx.Client, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The `logprobs` of each prompt, asked for as lm-eval does."""
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return [choice["logprobs"] for choice in choices]


@torch.no_grad()
def reference(prompts: list[list[int]]) -> list[torch.Tensor]:
    """The log-probabilities after each position of each prompt, one plain forward pass a prompt."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return [model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts]


def test_log_likelihoods_equal_those_of_transformers(http: httpx.Client) -> None:
    starts = [len(encode(http, context)) for context, _ in PAIRS]
    prompts = [encode(http, context + continuation) for context, continuation in PAIRS]
    scored = [logprobs for at in range(0, len(prompts), 25) for logprobs in score(http, prompts[at : at + 25])]
    assert len(scored) == len(PAIRS) == 100
    for prompt, start, logprobs, expected in zip(prompts, starts, scored, reference(prompts), strict=True):
        assert {len(entries) for entries in logprobs.values()} == {len(prompt) + 1}
        own, top = logprobs["token_logprobs"], logprobs["top_logprobs"]
        assert own[0] is None and top[0] is None
        after = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert own[start:-1] == pytest.approx(after[start - 1 :].tolist(), abs=1e-3)
        greedy = (expected[:-1].argmax(-1) == torch.tensor(prompt[1:])).tolist()
        assert [mine == max(best.values()) for mine, best in zip(own[1:-1], top[1:-1], strict=True)] == greedy


def test_ids_get_no_bos(http: httpx.Client) -> None:
    ids = encode(http, "SELECT 1;")
    (without,) = score(http, [ids])
    (given,) = score(http, [[BOS, *ids]])
    assert len(without["tokens"]) == len(ids) + 1 and len(given["tokens"]) == len(ids) + 2
    assert without["tokens"][:-1] == given["tokens"][1:-1]
    body = {"prompt": ids, "max_tokens": 1, "return_token_ids": True}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["prompt_token_ids"] == ids
