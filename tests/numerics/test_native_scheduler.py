"""The native tier under the real scheduler: the same tokens whatever the scheduler has to do.

Alone or in a crowd, chunked small, from the prefix cache, preempted, handed over to another engine.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from app.core.types import EngineOutput, EngineRequest, SamplingParams
from app.runner.native.runner import NativeRunner
from app.scheduler import Scheduler, SchedulerConfig
from tests.native_models import load_native, prompt_ids, write_model

NUM_NEW = 24
EOS = 0


@pytest.fixture(scope="module", params=[None, "int8"], ids=["bf16", "int8"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeRunner]:
    folder = write_model(tmp_path_factory.mktemp("native") / "model", {})
    native = load_native(folder, num_threads=2, num_kv_blocks=64, quantization=request.param)
    yield native
    native.close()


def requests() -> list[EngineRequest]:
    """Greedy, seeded and penalised ones; some share a prefix of two blocks."""
    shared = prompt_ids(128, seed=99)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "num_logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 8},
    ]
    made = []
    for index in range(12):
        tail = prompt_ids(46 + 7 * index % 17, seed=index)
        params = SamplingParams(seed=index, max_tokens=NUM_NEW, ignore_eos=True, **kinds[index % 4])
        prompt = (shared if index % 3 == 0 else ()) + tail
        made.append(EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, params=params))
    return made


def run(
    runner: NativeRunner, wanted: Sequence[EngineRequest], *, cut: int | None = None, **settings: Any
) -> tuple[dict[str, list[Any]], Scheduler]:
    """Drive until nothing is left (or `cut` steps are done); tokens and logprobs by request."""
    config = SchedulerConfig(
        **{
            "num_kv_blocks": runner.info.num_kv_blocks,
            "block_size": runner.info.block_size,
            "max_model_len": runner.info.max_model_len,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "vocab_size": runner.info.vocab_size,
            "eos_token_ids": (EOS,),
            **settings,
        }
    )
    scheduler = Scheduler(config)
    answers: dict[str, list[Any]] = {request.request_id: [] for request in wanted}

    def take(outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            assert output.error is None
            answers[output.request_id].extend(zip(output.token_ids, output.logprobs or output.token_ids, strict=True))

    for request in wanted:
        assert scheduler.add(request, 0.0) is None
    step = 0
    while scheduler.has_work and (cut is None or step < cut):
        plan = scheduler.schedule(0.0)
        assert plan is not None
        take(scheduler.apply(plan, runner.sample(plan, runner.forward(plan)), 0.0))
        step += 1
    return answers, scheduler


@pytest.fixture(scope="module")
def alone(runner: NativeRunner) -> dict[str, list[Any]]:
    """Each request by itself, nothing cached."""
    answers: dict[str, list[Any]] = {}
    for request in requests():
        one, _ = run(runner, [request], enable_prefix_caching=False)
        assert len(one[request.request_id]) == NUM_NEW
        answers.update(one)
    return answers


def test_a_crowd_gets_the_same_tokens(runner: NativeRunner, alone: dict[str, list[Any]]) -> None:
    answers, _ = run(runner, requests(), enable_prefix_caching=False)
    assert answers == alone


def test_small_chunks_bring_the_same_tokens(runner: NativeRunner, alone: dict[str, list[Any]]) -> None:
    answers, _ = run(runner, requests(), max_num_batched_tokens=23)
    assert answers == alone


def test_prefix_hits_bring_the_same_tokens(runner: NativeRunner, alone: dict[str, list[Any]]) -> None:
    wanted = requests()
    again = [EngineRequest(request_id=f"again-{r.request_id}", prompt_token_ids=r.prompt_token_ids, params=r.params)
             for r in wanted]  # fmt: skip
    answers, scheduler = run(runner, wanted + again, max_num_seqs=3)
    assert scheduler.counts().total_prefix_hit_tokens > 500
    assert {name: answers[name] for name in alone} == alone
    assert {name: answers[f"again-{name}"] for name in alone} == alone


def test_preemption_brings_the_same_tokens(runner: NativeRunner, alone: dict[str, list[Any]]) -> None:
    answers, scheduler = run(runner, requests(), num_kv_blocks=5, enable_prefix_caching=False)
    assert scheduler.counts().total_preemptions > 0
    assert answers == alone


def test_a_handover_brings_the_same_tokens(runner: NativeRunner, alone: dict[str, list[Any]]) -> None:
    first, _ = run(runner, requests(), cut=9, max_num_batched_tokens=200)
    assert any(first.values())
    handed_over = [
        EngineRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            output_token_ids=tuple(token_id for token_id, _ in first[request.request_id]),
        )
        for request in requests()
    ]
    rest, _ = run(runner, handed_over)
    assert {name: first[name] + rest[name] for name in alone} == alone
