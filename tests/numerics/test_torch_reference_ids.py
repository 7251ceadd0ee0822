"""The default model, in float32, against the committed outputs of `transformers.generate`.

32 tokens for each of more than 50 prompts: English, Chinese, emoji, code, digits. A token may differ only
where the reference's two best logits lie within 1e-4; that is printed.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.runner.base import ModelRunner
from app.runner.torch.any_tier import load
from app.store import resolve
from app.text.tokenizer import Tokenizer
from tests.numerics.driver import Driver, assert_same, greedy

REFERENCE = json.loads((Path(__file__).parent.parent / "data" / "reference_ids.json").read_text(encoding="utf-8"))
PROMPTS: list[dict[str, Any]] = REFERENCE["prompts"]
NUM_TOKENS: int = REFERENCE["num_tokens"]
BLOCK_SIZE = 16
AT_ONCE = 32


@pytest.fixture(scope="module")
def model_dir() -> Path:
    try:
        return resolve(REFERENCE["model"], report=print).path
    except ConfigurationError as error:
        pytest.skip(f"NOT RUN, the default model cannot be had here: {error}")


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> ModelRunner:
    return load(
        EngineConfig(
            model_dir=str(model_dir),
            dtype="float32",
            num_threads=1,
            block_size=BLOCK_SIZE,
            num_kv_blocks=2048,
            max_num_seqs=AT_ONCE,
            max_num_batched_tokens=64,
        )
    )


def check(outputs: list[list[int]], entries: list[dict[str, Any]], *, what: str) -> None:
    assert len(outputs) == len(entries)
    for got, entry in zip(outputs, entries, strict=True):
        margins = [entry["margins"].get(str(index), 1.0) for index in range(NUM_TOKENS)]
        assert_same(got, entry["output"][: len(got)], margins[: len(got)], what=f"{what}, {entry['text'][:40]!r}")


def ids(entries: list[dict[str, Any]]) -> list[list[int]]:
    return [entry["prompt"] for entry in entries]


def test_the_tokenizer_gives_the_prompts_ids(model_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    assert len(PROMPTS) >= 50
    assert [tokenizer.encode_now(entry["text"]) for entry in PROMPTS] == ids(PROMPTS)


def test_alone(runner: ModelRunner) -> None:
    entries = PROMPTS[::20]
    driver = Driver(runner)
    check([driver.run([entry["prompt"]], greedy(NUM_TOKENS))[0] for entry in entries], entries, what="alone")


def test_all_prompts_32_at_once_in_small_chunks_and_with_prefix_hits(runner: ModelRunner) -> None:
    driver = Driver(runner, budget=AT_ONCE + 12, max_num_seqs=AT_ONCE)
    check(driver.run(ids(PROMPTS), greedy(NUM_TOKENS)), PROMPTS, what="at once")
    before = driver.scheduler.counts().total_prefix_hit_tokens
    again = PROMPTS[-AT_ONCE // 2 :]
    check(driver.run(ids(again), greedy(8)), again, what="with prefix hits")
    assert driver.scheduler.counts().total_prefix_hit_tokens > before


def test_with_preemption(runner: ModelRunner) -> None:
    entries = PROMPTS[1::5]
    driver = Driver(runner, budget=64, num_kv_blocks=2 * len(entries))
    check(driver.run(ids(entries), greedy(NUM_TOKENS)), entries, what="with preemption")
    assert driver.scheduler.counts().total_preemptions > 0


@pytest.mark.slow
def test_every_prompt_alone(runner: ModelRunner) -> None:
    driver = Driver(runner)
    check([driver.run([entry["prompt"]], greedy(NUM_TOKENS))[0] for entry in PROMPTS], PROMPTS, what="alone")
