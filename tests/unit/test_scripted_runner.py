"""The scripted tier: rows independent of each other, of chunking and of hand-overs; scripts; choice of the tier."""

import pytest

from app.core.config import EngineConfig
from app.core.errors import ConfigurationError
from app.core.plan import LogitsNeed, PlanEntry, RowResult, RowStart, StepPlan
from app.core.types import SamplingParams
from app.runner import choose
from app.runner.scripted import ScriptedRunner, load


def runner(*, eos: tuple[int, ...] = (), **settings: float | int | str) -> ScriptedRunner:
    return load(EngineConfig(model_dir="", tier="scripted", eos_token_ids=eos, scripted=settings))


class Row:
    """Drives one row of a runner by hand."""

    def __init__(
        self,
        scripted: ScriptedRunner,
        *,
        row: int = 0,
        prompt: tuple[int, ...] = (1, 2, 3),
        output: tuple[int, ...] = (),
        params: SamplingParams | None = None,
    ) -> None:
        self.runner = scripted
        self.row = row
        self.token_ids = [*prompt, *output]
        self.computed = 0
        params = SamplingParams(seed=1, max_tokens=99, temperature=0.0) if params is None else params
        self.start: RowStart | None = RowStart("a", params, prompt, output)

    def entry(self, num_tokens: int | None = None, *, logits: LogitsNeed = LogitsNeed.LAST) -> PlanEntry:
        end = len(self.token_ids) if num_tokens is None else self.computed + num_tokens
        entry = PlanEntry(
            self.row,
            self.computed,
            tuple(self.token_ids[self.computed : end]),
            0,
            (0,),
            0,
            logits,
            end == len(self.token_ids),
            self.start,
        )
        self.start = None
        self.computed = end
        return entry

    def step(self, num_tokens: int | None = None, *, logits: LogitsNeed = LogitsNeed.LAST) -> RowResult:
        return self.take(run(self.runner, self.entry(num_tokens, logits=logits))[0])

    def take(self, result: RowResult) -> RowResult:
        self.token_ids += result.token_ids
        return result

    def tokens(self, count: int) -> list[int]:
        return [self.step().token_ids[0] for _ in range(count)]


def run(scripted: ScriptedRunner, *entries: PlanEntry) -> tuple[RowResult, ...]:
    plan = StepPlan(1, entries)
    return scripted.sample(plan, scripted.forward(plan)).rows


def test_tokens_do_not_depend_on_chunks_rows_or_hand_overs() -> None:
    expected = Row(runner()).tokens(10)
    chunked = Row(runner(), row=5)
    assert chunked.step(1).token_ids == ()
    assert chunked.step(1).token_ids == ()
    assert chunked.tokens(10) == expected
    assert Row(runner(), output=tuple(expected[:4])).tokens(6) == expected[4:]
    scripted = runner()
    rows = [Row(scripted, row=0), Row(scripted, row=1, prompt=(9, 9))]
    for expected_token in expected:
        results = run(scripted, *(row.entry() for row in rows))
        assert rows[0].take(results[0]).token_ids == (expected_token,)
        rows[1].take(results[1])


def test_the_context_matters_and_the_seed_where_the_temperature_is_not_zero() -> None:
    def tokens(seed: int, temperature: float, prompt: tuple[int, ...] = (1, 2, 3)) -> list[int]:
        params = SamplingParams(seed=seed, max_tokens=9, temperature=temperature)
        return Row(runner(), prompt=prompt, params=params).tokens(6)

    assert tokens(1, 0.0) == tokens(2, 0.0)
    assert tokens(1, 1.0) == tokens(1, 1.0) != tokens(2, 1.0)
    assert tokens(1, 0.0) != tokens(1, 0.0, prompt=(1, 3, 2))


def test_a_plan_with_a_hole_is_noticed() -> None:
    row = Row(runner())
    row.tokens(2)
    row.computed = 1
    with pytest.raises(RuntimeError, match="position 1 where 4"):
        row.step()


def test_a_cycle_of_tokens_and_an_end() -> None:
    assert Row(runner(tokens="7,8")).tokens(5) == [7, 8, 7, 8, 7]
    assert Row(runner(tokens="7", eos=(3, 2), eos_after=2)).tokens(3) == [7, 7, 2]
    ignoring = SamplingParams(seed=1, max_tokens=9, ignore_eos=True)
    assert Row(runner(tokens="7", eos=(2,), eos_after=1), params=ignoring).tokens(3) == [7, 7, 7]
    eos = tuple(range(990))
    assert set(Row(runner(eos=eos)).tokens(50)).isdisjoint(eos)


def test_logprobs_where_asked_for() -> None:
    params = SamplingParams(seed=1, max_tokens=9, num_logprobs=3, num_prompt_logprobs=1)
    row = Row(runner(), params=params)
    first, second = row.step(2, logits=LogitsNeed.ALL), row.step(logits=LogitsNeed.ALL)
    assert [entry.top_token_ids for entry in first.prompt_logprobs + second.prompt_logprobs] == [(2,), (3,)]
    (drawn,) = second.logprobs
    assert drawn.top_token_ids[0] == second.token_ids[0]
    assert drawn.logprob == drawn.top_logprobs[0] > drawn.top_logprobs[1] > drawn.top_logprobs[2]


def test_a_row_fails_alone() -> None:
    scripted = runner(fail_on_token=3)
    bad, good = run(scripted, Row(scripted, row=0).entry(), Row(scripted, row=1, prompt=(1,)).entry())
    assert bad.error is not None
    assert good.error is None


@pytest.mark.parametrize("settings", [{"tempo": 1}, {"vocab_size": "many"}, {"tokens": "a"}, {"tokens": "1000"}])
def test_wrong_settings_are_told(settings: dict[str, float | int | str]) -> None:
    with pytest.raises(ConfigurationError, match="scripted"):
        load(EngineConfig(model_dir="", tier="scripted", scripted=settings))


def test_values_of_the_configuration_come_first() -> None:
    config = EngineConfig(
        model_dir="", tier="scripted", num_kv_blocks=3, block_size=4, max_model_len=10, scripted={"max_model_len": 99}
    )
    info = choose.load_runner(config).info
    assert (info.num_kv_blocks, info.block_size, info.max_model_len) == (3, 4, 10)


def test_an_unknown_tier_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="steam"):
        choose.load_runner(EngineConfig(model_dir="", tier="steam"))


def test_a_model_folder_that_is_not_there_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="/nowhere"):
        choose.load_runner(EngineConfig(model_dir="/nowhere", tier="native"))
