"""The client's decisions without processes: restarts, hangs, blame and the order of hand-overs. Times are passed in."""

import msgspec
import pytest

from app.client.handover import HandOver, blame
from app.client.journal import LiveSequence
from app.client.process import describe_returncode
from app.client.restart import RestartBudget
from app.client.settings import Supervision
from app.client.stall import StallWatch
from app.core.types import EngineOutput, EngineRequest, SamplingParams
from app.ipc.progress import EnginePhase, Progress

SUPERVISION = Supervision(tick_seconds=1.0)


def page(phase: EnginePhase, *, step_id: int = 1, written_ns: int = 0) -> Progress:
    return Progress(1, phase, step_id, written_ns, 1, 0, ())


def sequence(name: str, *, strikes: int = 0) -> LiveSequence:
    live = LiveSequence(
        EngineRequest(request_id=name, prompt_token_ids=(1,), params=SamplingParams(seed=0, max_tokens=9))
    )
    live.strikes = strikes
    return live


def token(name: str) -> EngineOutput:
    return EngineOutput(name, (5,))


def first_accusation(
    watch: StallWatch, progress: Progress | None, *, is_ready: bool = True, has_live: bool = True
) -> int:
    """At which second of looking every second."""
    for second in range(1000):
        if watch.look(progress, float(second), is_ready=is_ready, has_live=has_live):
            return second
    return -1


class TestRestartBudget:
    def test_the_first_restart_is_at_once_and_the_next_ones_wait_longer(self) -> None:
        budget = RestartBudget(msgspec.structs.replace(SUPERVISION, max_deaths=9, max_backoff_seconds=1.5))
        delays = [budget.next_delay(ready_seconds=0.1, counts=True) for _ in range(5)]
        assert delays == [0.0, 0.5, 1.0, 1.5, 1.5]

    def test_the_fifth_death_in_the_window_is_the_last(self) -> None:
        budget = RestartBudget(SUPERVISION)
        assert [budget.next_delay(ready_seconds=1.0, counts=True) is None for _ in range(5)] == [False] * 4 + [True]

    def test_deaths_far_apart_do_not_add_up(self) -> None:
        budget = RestartBudget(SUPERVISION)
        assert all(budget.next_delay(ready_seconds=16.0, counts=True) is not None for _ in range(50))

    def test_a_token_between_forgives_and_an_explained_death_does_not_count(self) -> None:
        budget = RestartBudget(SUPERVISION)
        for _ in range(20):
            assert budget.next_delay(ready_seconds=0.0, counts=True) == 0.0
            budget.forgive()
        assert all(budget.next_delay(ready_seconds=0.0, counts=False) is not None for _ in range(20))


class TestStallWatch:
    def test_a_step_without_end_is_a_hang(self) -> None:
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.STEPPING)) == 11

    def test_an_unreadable_page_is_a_hang(self) -> None:
        assert first_accusation(StallWatch(SUPERVISION), None) == 11

    def test_slow_steps_of_late_raise_the_limit(self) -> None:
        watch = StallWatch(SUPERVISION)
        for seconds in (1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0):
            watch.note_step(seconds)
        assert watch.step_limit() == 40.0
        assert first_accusation(watch, page(EnginePhase.STEPPING)) == 41

    @pytest.mark.parametrize("phase", [EnginePhase.UNBORN, EnginePhase.LOADING])
    def test_loading_has_its_own_limit(self, phase: EnginePhase) -> None:
        assert first_accusation(StallWatch(SUPERVISION), page(phase), is_ready=False) == 601

    def test_idle_is_fine_unless_sequences_wait_and_blocked_is_fine(self) -> None:
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.IDLE), has_live=False) == -1
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.IDLE)) == 11
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.BLOCKED)) == -1

    def test_progress_begins_the_count_anew(self) -> None:
        watch = StallWatch(SUPERVISION)
        for second in range(100):
            progress = page(EnginePhase.STEPPING, step_id=second // 9)
            assert watch.look(progress, float(second), is_ready=True, has_live=True) is None

    def test_our_own_sleep_is_not_held_against_the_engine(self) -> None:
        watch = StallWatch(SUPERVISION)
        stepping = page(EnginePhase.STEPPING)
        for now in (0.0, 1.0, 3600.0, 3601.0):
            assert watch.look(stepping, now, is_ready=True, has_live=True) is None


class TestBlame:
    def test_only_those_in_the_step_without_a_token_are_suspects(self) -> None:
        moved, stuck, queued = sequence("moved"), sequence("stuck"), sequence("queued")
        moved.receive(token("moved"))
        verdict = blame([moved, stuck, queued], [moved.key, stuck.key], max_strikes=3)
        assert verdict.suspects == (stuck,)
        assert verdict.explains_death
        assert [each.strikes for each in (moved, stuck, queued)] == [0, 1, 0]

    def test_the_third_strike_convicts_and_a_token_takes_strikes_back(self) -> None:
        innocent, guilty = sequence("innocent", strikes=2), sequence("guilty", strikes=2)
        innocent.receive(token("innocent"))
        verdict = blame([innocent, guilty], [innocent.key, guilty.key], max_strikes=3)
        assert verdict.convicted == (guilty,)
        assert not verdict.explains_death
        assert innocent.strikes == 0


class TestHandOver:
    def test_without_strikes_all_go_at_once(self) -> None:
        live = [sequence("a"), sequence("b")]
        hand_over = HandOver()
        assert hand_over.begin(live) == live
        assert hand_over.is_complete
        assert hand_over.release() == []

    def test_suspects_go_one_by_one_after_the_others_fewest_strikes_first(self) -> None:
        clean, once, twice, gone = sequence("c"), sequence("1", strikes=1), sequence("2", strikes=2), sequence("g")
        gone.strikes = 1
        hand_over = HandOver()
        assert hand_over.begin([twice, gone, once, clean]) == [clean]
        gone.is_finished = True
        assert hand_over.release() == [once]
        assert hand_over.release() == []
        once.hand_over()
        once.receive(token("1"))
        assert hand_over.release() == [twice]
        assert hand_over.is_complete

    def test_suspects_alone_begin_at_once_and_an_abort_makes_room(self) -> None:
        first, second = sequence("1", strikes=1), sequence("2", strikes=1)
        hand_over = HandOver()
        assert hand_over.begin([first, second]) == [first]
        first.is_finished = True
        assert hand_over.release() == [second]


@pytest.mark.parametrize(
    ("returncode", "words"),
    [(0, "status 0"), (13, "status 13"), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-200, "signal 200"), (None, "did not")],
)
def test_an_exit_is_told_in_words(returncode: int | None, words: str) -> None:
    assert words in describe_returncode(returncode)
