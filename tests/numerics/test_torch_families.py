"""Families of the torch runner, token for token against `transformers.generate`."""

from pathlib import Path

import pytest
import torch

from app.core.config import EngineConfig
from app.core.types import SamplingParams
from app.runner.torch.any_tier import load
from app.runner.torch.families import VERIFIED
from tests.numerics.driver import Driver, assert_same, greedy
from tests.numerics.families import CONFIGS, NUM_TOKENS, Reference, make_reference

BLOCK_SIZE = 8


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    torch.set_num_threads(1)
    return make_reference(request.param, tmp_path_factory.mktemp("model"))


def config(folder: Path, **fields: object) -> EngineConfig:
    defaults: dict[str, object] = {
        "model_dir": str(folder),
        "dtype": "float32",
        "num_threads": 1,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 16,
        "num_kv_blocks": 64,
        "max_num_batched_tokens": 64,
    }
    return EngineConfig(**(defaults | fields))  # type: ignore[arg-type]


def test_greedy_tokens_equal_transformers(reference: Reference) -> None:
    runner = load(config(reference.folder))
    prompts = reference.prompts

    def check(got: list[list[int]], what: str) -> None:
        for index, one in enumerate(got):
            assert_same(one, reference.outputs[index], reference.margins[index], what=f"{what}, prompt {index}")

    check([Driver(runner).run([prompt], greedy(NUM_TOKENS))[0] for prompt in prompts], "alone")
    chunked = Driver(runner, budget=5)
    check(chunked.run(prompts, greedy(NUM_TOKENS)), "batched in small chunks")
    hits = chunked.scheduler.counts().total_prefix_hit_tokens
    check(chunked.run(prompts, greedy(NUM_TOKENS)), "with prefix hits")
    assert chunked.scheduler.counts().total_prefix_hit_tokens > hits
    longest = -(-(len(prompts[-1]) + NUM_TOKENS) // BLOCK_SIZE)
    tight = Driver(runner, budget=16, num_kv_blocks=longest + 1)
    check(tight.run(prompts, greedy(NUM_TOKENS)), "with preemption")
    assert tight.scheduler.counts().total_preemptions > 0


@pytest.mark.parametrize("budget", [3, 64])
def test_prompt_logprobs_equal_transformers(reference: Reference, budget: int) -> None:
    """Sharper than tokens: every logit takes part in these."""
    runner = load(config(reference.folder))
    params = SamplingParams(seed=0, max_tokens=0, num_prompt_logprobs=2)
    outputs = Driver(runner, budget=budget).run_outputs([reference.prompts[-1]], [params])[0]
    got = [one.logprob for output in outputs for one in output.prompt_logprobs]
    assert got == pytest.approx(reference.prompt_logprobs, abs=1e-4)


def test_what_is_called_verified_is_tested_here() -> None:
    assert frozenset(name.split()[0] for name in CONFIGS) == VERIFIED
