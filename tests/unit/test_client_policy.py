"""The client's decisions without processes: restarts, hangs, who is blamed. Times are passed in."""

import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from app.client.autopsy import MemoryWatch, find_kill_counter, is_self_inflicted, is_stopped, leaves_memory_true
from app.client.handover import Blame, blame, in_parts
from app.client.journal import LiveSequence
from app.client.process import describe_returncode
from app.client.quarantine import MAX_ENTRIES, QUARANTINE_SECONDS, Quarantine
from app.client.restart import RestartBudget
from app.client.settings import Supervision
from app.client.stall import StallWatch, StepTimes
from app.client.starvation import RunQueueWait
from app.core.types import EngineOutput, EngineRequest, Grammar, GrammarKind, SamplingParams
from app.ipc.progress import EnginePhase, Progress

SUPERVISION = Supervision(tick_seconds=1.0)


def page(phase: EnginePhase, *, step_id: int = 1, written_ns: int = 0) -> Progress:
    return Progress(1, phase, step_id, written_ns, 1, 0, ())


def sequence(name: str, *, is_on_probation: bool = False) -> LiveSequence:
    live = LiveSequence(
        EngineRequest(request_id=name, prompt_token_ids=(1,), params=SamplingParams(seed=0, max_tokens=9))
    )
    live.is_on_probation = is_on_probation
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
    def test_deaths_far_apart_are_not_in_a_row(self) -> None:
        budget = RestartBudget(SUPERVISION)
        ready = SUPERVISION.window_seconds
        assert [budget.next_delay(ready_seconds=ready, counts=True) for _ in range(9)] == [0.0] * 9

    def test_those_of_their_own_making_are_told_apart(self) -> None:
        budget = RestartBudget(SUPERVISION)
        for is_own, count in ((False, 0), (True, 1), (False, 1), (True, 2)):
            budget.next_delay(ready_seconds=0.0, counts=False, is_self_inflicted=is_own)
            assert budget.num_of_own_making == count
        budget.forgive()
        assert budget.num_of_own_making == 0

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


class TestStepTimes:
    def test_an_engine_without_a_step_is_given_time(self) -> None:
        times = StepTimes(SUPERVISION)
        assert times.expected(1) == 1.01
        assert times.expected(2048) == 1.0 + 20.48

    def test_the_slowest_of_the_last_steps_of_that_size_counts(self) -> None:
        times = StepTimes(SUPERVISION)
        for seconds in (9.0, *[0.02] * 16, 0.05, *[0.02] * 15):
            times.note(5, seconds)
        assert times.expected(4) == times.expected(7) == 0.05

    def test_other_sizes_are_estimated_on_the_slow_side(self) -> None:
        times = StepTimes(SUPERVISION)
        times.note(1, 0.02)
        assert times.expected(1024) == pytest.approx(20.48)
        times.note(2048, 0.4)
        assert times.expected(1024) == pytest.approx(20.48)
        times.note(512, 0.1)
        assert times.expected(1024) == 0.4
        assert times.expected(4096) == pytest.approx(0.8)

    def test_messages_between_steps_are_no_steps(self) -> None:
        times = StepTimes(SUPERVISION)
        times.note(0, 0.1)
        times.note(1, 0.0)
        assert times.expected(1) == 1.01


class TestStallWatch:
    def test_the_first_step_may_take_ten_times_the_guess(self) -> None:
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.STEPPING)) == 11

    def test_a_step_without_end_is_a_hang_after_two_seconds_where_steps_are_fast(self) -> None:
        watch = StallWatch(SUPERVISION)
        watch.times.note(1, 0.02)
        assert first_accusation(watch, page(EnginePhase.STEPPING)) == 3
        assert watch.is_suspicious

    def test_slow_steps_of_late_raise_the_limit(self) -> None:
        watch = StallWatch(SUPERVISION)
        watch.times.note(1, 2.0)
        assert first_accusation(watch, page(EnginePhase.STEPPING)) == 21

    def test_an_unreadable_page_is_a_hang(self) -> None:
        assert first_accusation(StallWatch(SUPERVISION), None) == 11

    def test_time_in_line_for_a_core_does_not_count(self) -> None:
        watch = StallWatch(SUPERVISION)
        watch.times.note(1, 0.02)
        stepping = page(EnginePhase.STEPPING)
        for second in range(100):
            looks = {"is_ready": True, "has_live": True, "starved_seconds": 1.5 if second % 2 else 0.97}
            assert watch.look(stepping, float(second), **looks) is None  # type: ignore[arg-type]
        assert not watch.is_suspicious or watch.stalled_seconds < 2

    def test_a_stopped_engine_is_accused_also_while_idle(self) -> None:
        watch = StallWatch(SUPERVISION)
        watch.times.note(1, 0.02)
        idle = page(EnginePhase.IDLE)
        accusations = [
            watch.look(idle, float(second), is_ready=True, has_live=False, is_stopped=True) for second in range(5)
        ]
        assert [accusation is not None for accusation in accusations] == [False, False, False, True, True]

    @pytest.mark.parametrize("phase", [EnginePhase.UNBORN, EnginePhase.LOADING])
    def test_loading_has_its_own_limit(self, phase: EnginePhase) -> None:
        assert first_accusation(StallWatch(SUPERVISION), page(phase), is_ready=False) == 601

    def test_an_engine_that_has_loaded_and_does_not_say_so_is_a_hang(self) -> None:
        watch = StallWatch(SUPERVISION)
        assert first_accusation(watch, page(EnginePhase.IDLE), is_ready=False, has_live=False) == 11

    def test_idle_is_fine_unless_sequences_wait_and_blocked_is_fine(self) -> None:
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.IDLE), has_live=False) == -1
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.IDLE)) == 11
        assert first_accusation(StallWatch(SUPERVISION), page(EnginePhase.BLOCKED)) == -1

    def test_preparing_a_grammar_may_take_long_unless_it_was_stopped(self) -> None:
        preparing = page(EnginePhase.PREPARING)
        assert first_accusation(StallWatch(SUPERVISION), preparing) == 61
        watch = StallWatch(SUPERVISION)
        accusations = [
            watch.look(preparing, float(second), is_ready=True, has_live=True, is_stopped=True) for second in range(20)
        ]
        assert any(accusations)

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


class TestParts:
    def test_all_that_is_sent_counts(self) -> None:
        plain = sequence("a").request
        params = [
            SamplingParams(seed=0, max_tokens=9, grammar=Grammar(GrammarKind.REGEX, "a" * 600)),
            SamplingParams(seed=0, max_tokens=9, logit_bias=tuple((index, 0.5) for index in range(100))),
            SamplingParams(seed=0, max_tokens=9, allowed_token_ids=tuple(range(300))),
            SamplingParams(seed=0, max_tokens=9, bad_words=((1, 2, 3),) * 200),
        ]
        large = [msgspec.structs.replace(plain, params=each) for each in params]
        assert list(in_parts(large, max_bytes=1000)) == [(each,) for each in large]
        assert list(in_parts([plain] * 5, max_bytes=1000)) == [(plain,) * 5]


class TestBlame:
    def test_everyone_in_the_step_is_suspected_and_nobody_else(self) -> None:
        moved, stuck, queued = sequence("moved"), sequence("stuck"), sequence("queued")
        moved.receive(token("moved"))
        verdict = blame([moved, stuck, queued], [moved.key, stuck.key], is_self_inflicted=True)
        assert verdict.suspects == (moved, stuck)
        assert not verdict.explains_death
        assert [each.is_on_probation for each in (moved, stuck, queued)] == [True, True, False]

    def test_the_one_whose_lone_step_ends_an_engine_is_convicted(self) -> None:
        tried, waiting = sequence("tried", is_on_probation=True), sequence("waiting", is_on_probation=True)
        verdict = blame([waiting, tried], [tried.key], is_self_inflicted=True)
        assert verdict.convicted is tried
        assert verdict.suspects == ()
        assert not verdict.explains_death

    def test_a_first_suspect_alone_gets_its_chance(self) -> None:
        alone = sequence("alone")
        verdict = blame([alone], [alone.key], is_self_inflicted=True)
        assert verdict.explains_death and alone.is_on_probation

    def test_company_in_the_step_is_no_proof(self) -> None:
        """Also where the other one has left the journal."""
        tried = sequence("tried", is_on_probation=True)
        assert blame([tried], [tried.key, 7], is_self_inflicted=True).convicted is None

    def test_a_token_acquits(self) -> None:
        tried = sequence("tried", is_on_probation=True)
        tried.receive(token("tried"))
        assert not tried.is_on_probation
        assert blame([tried], [tried.key], is_self_inflicted=True).convicted is None

    def test_an_end_from_outside_blames_nobody(self) -> None:
        tried, other = sequence("tried", is_on_probation=True), sequence("other")
        assert blame([tried, other], [tried.key], is_self_inflicted=False) == Blame()
        assert tried.is_on_probation and not other.is_on_probation

    def test_the_next_engine_is_told(self) -> None:
        tried = sequence("tried", is_on_probation=True)
        assert tried.hand_over().is_on_probation
        tried.received.append(5)
        assert tried.hand_over().is_on_probation
        assert not sequence("other").hand_over().is_on_probation


class TestAutopsy:
    @pytest.mark.parametrize(
        ("returncode", "expected"),
        [
            *[(-number, True) for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL)],
            *[(-number, False) for number in (signal.SIGKILL, signal.SIGQUIT, signal.SIGUSR1)],
            *[(0, True), (13, True), (None, True)],
        ],
    )
    def test_how_a_process_ended_says_who_ended_it(self, returncode: int | None, expected: bool) -> None:
        assert is_self_inflicted(returncode, was_out_of_memory=False) is expected

    def test_the_kernels_kill_for_want_of_memory_is_self_inflicted(self) -> None:
        assert is_self_inflicted(-signal.SIGKILL, was_out_of_memory=True)
        assert "memory" in describe_returncode(-signal.SIGKILL, was_out_of_memory=True)

    def test_our_cgroup_is_asked_before_the_machine(self, tmp_path: Path) -> None:
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "vmstat").write_text("pgfault 9\noom_kill 4\n")
        (proc / "self" / "cgroup").write_text("4:memory:/v1\n0::/pod/container\n")
        assert find_kill_counter(cgroups=cgroups, proc=proc).read() == 4
        (cgroups / "pod" / "container").mkdir(parents=True)
        (cgroups / "pod" / "container" / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
        assert find_kill_counter(cgroups=cgroups, proc=proc).read() == 2
        (cgroups / "memory" / "v1").mkdir(parents=True)
        (cgroups / "memory" / "v1" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
        assert find_kill_counter(cgroups=cgroups, proc=proc).read() == 1

    def test_a_machine_that_tells_nothing_counts_nothing(self, tmp_path: Path) -> None:
        assert find_kill_counter(cgroups=tmp_path, proc=tmp_path).read() == 0

    def test_a_rise_counts_for_a_while(self) -> None:
        counts = [0]
        watch = MemoryWatch(lambda: counts[-1], 0.0)
        counts.append(1)
        for now in (1.0, 6.0):
            watch.tick(now)
            assert watch.has_risen()
        watch.tick(12.0)
        assert not watch.has_risen()

    def test_a_stopped_process_is_told_from_one_at_work(self) -> None:
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                assert not is_stopped(process.pid)
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                assert is_stopped(process.pid)
            finally:
                process.kill()
        assert not is_stopped(process.pid)


class TestQuarantine:
    def test_the_same_request_is_kept_out_whatever_its_seed_and_name(self) -> None:
        now = [0.0]
        quarantine = Quarantine(lambda: now[0])
        bad = sequence("bad").request
        assert not quarantine.holds(bad)
        quarantine.put(bad)
        again = msgspec.structs.replace(
            bad, request_id="again", params=msgspec.structs.replace(bad.params, seed=99), priority=3
        )
        assert quarantine.holds(again)
        assert not quarantine.holds(msgspec.structs.replace(bad, prompt_token_ids=(1, 2)))
        now[0] = QUARANTINE_SECONDS
        assert not quarantine.holds(again)

    def test_it_is_bounded(self) -> None:
        quarantine = Quarantine()
        requests = [
            msgspec.structs.replace(sequence("x").request, prompt_token_ids=(index,))
            for index in range(MAX_ENTRIES + 1)
        ]
        for request in requests:
            quarantine.put(request)
        assert [quarantine.holds(request) for request in (requests[0], requests[1], requests[-1])] == [
            False,
            True,
            True,
        ]


@pytest.mark.parametrize(
    ("returncode", "was_out_of_memory", "is_true"),
    [
        (-signal.SIGKILL, False, True),
        (-signal.SIGTERM, False, True),
        (-signal.SIGKILL, True, False),
        (-signal.SIGSEGV, False, False),
        (-signal.SIGBUS, False, False),
        (-signal.SIGABRT, False, False),
        (0, False, False),
        (1, False, False),
        (None, False, False),
    ],
)
def test_memory_is_believed_after_a_death_from_outside(
    returncode: int | None, was_out_of_memory: bool, is_true: bool
) -> None:
    assert leaves_memory_true(returncode, was_out_of_memory=was_out_of_memory) is is_true


@pytest.mark.parametrize(
    ("returncode", "words"),
    [(0, "status 0"), (13, "status 13"), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-200, "signal 200"), (None, "did not")],
)
def test_an_exit_is_told_in_words(returncode: int | None, words: str) -> None:
    assert words in describe_returncode(returncode)


class TestRunQueueWait:
    def test_the_thread_that_waited_longest_counts(self, tmp_path: Path) -> None:
        wait = RunQueueWait(7, proc=tmp_path)
        assert wait.take() == 0.0  # no such process

        def write(thread: str, waited: int) -> None:
            folder = tmp_path / "7" / "task" / thread
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "schedstat").write_text(f"100 {waited} 3\n")

        write("7", 10**9)
        assert wait.take() == 0.0
        write("7", 2 * 10**9)
        write("8", 5 * 10**9)  # a new thread: its past is not ours
        assert wait.take() == 1.0
        write("8", 8 * 10**9)
        assert wait.take() == 3.0
