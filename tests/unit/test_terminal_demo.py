"""The demo's rounds, its killer and its words, against a small server of another make."""

import asyncio
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from rich.console import Console

from app.terminal.demo import DemoOptions, DemoResult, run_demo
from app.terminal.demo_kill import kill_engine, make_killer, why_not_killable
from app.terminal.demo_prompts import demo_prompts
from app.terminal.demo_report import judge, show_head, show_round, show_verdict
from app.terminal.demo_round import Ask, Outcome, Round, Stream, Watch, run_round
from app.terminal.wire import ApiError, client_options
from tests.terminal_server import Refusal, event_of, other_server

PROMPTS = demo_prompts()[:4]


def answer(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
    """A text that is a function of prompt and seed, as of a decoder."""
    assert path == "/v1/completions" and body["stream"] is True
    yield f"({body['prompt']}\u2028"
    yield f"{body['seed']})"
    yield event_of("", finish_reason="length")


def run(options: DemoOptions) -> tuple[DemoResult, str]:
    """Run the demo; the result and what it printed."""
    out = io.StringIO()
    result = run_demo(options, console=Console(file=out, width=120), progress=Console(file=io.StringIO()))
    return result, out.getvalue()


def outcome(text: str, error: str | None = None) -> Outcome:
    return Outcome(text, None if error else "stop", error, 0.5)


def round_of(name: str, *texts: str) -> Round:
    return Round(name, tuple(outcome(text) for text in texts), 1.0, ())


def test_prompts_are_as_promised() -> None:
    prompts = demo_prompts()
    assert len(prompts) == len({prompt.text for prompt in prompts}) == len({prompt.seed for prompt in prompts}) == 16
    assert 6 <= sum(prompt.temperature == 0 for prompt in prompts) <= 10


def test_another_server_without_ready() -> None:
    with other_server(answer) as server:
        result, printed = run(DemoOptions(url=f"{server.url}/v1", prompts=PROMPTS, key="secret"))
    assert [done.num_finished for done in result.rounds] == [4, 4]
    assert result.rounds[0].digest == result.rounds[1].digest
    assert result.rounds[0].outcomes[0].text == f"({PROMPTS[0].text}\u2028{PROMPTS[0].seed})"
    assert f"Two equal hashes:\n{result.rounds[0].digest}\n" in printed
    assert "Equality is not promised" in printed and "No engine was killed: its /ready names no engine" in printed
    assert result.verdict.exit_code == 0
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    assert server.bodies[0] == {
        "model": "other-model",
        "prompt": PROMPTS[0].text,
        "max_tokens": 64,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 7,
        "stream": True,
    }


@pytest.mark.parametrize(("is_promised", "code", "words"), [(True, 1, "differ;"), (False, 0, "differ, as they may;")])
def test_texts_that_differ_are_found(is_promised: bool, code: int, words: str) -> None:
    calls = iter(range(100))

    def corrupting(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
        tail = "corrupted" if next(calls) >= len(PROMPTS) and body["seed"] == PROMPTS[2].seed else "as it was"
        return ["the beginning, ", tail, event_of("", finish_reason="stop")]

    model = {"id": "m", "row_independent": is_promised}
    with other_server(corrupting, model=model) as server:
        result, printed = run(DemoOptions(url=server.url, prompts=PROMPTS))
    (found,) = result.verdict.differences
    assert (found.round_name, found.prompt_number, found.position) == ("all together", 3, 15)
    assert "prompt 3, all together: differs at character 15: 'corrupted' in place of 'as it was'" in printed
    assert f"The hashes {words} prompts that differ: 3 of 4." in printed
    assert result.verdict.exit_code == code


def test_one_character_makes_another_hash_and_so_does_its_place() -> None:
    digests = {round_of("r", *texts).digest for texts in (("ab", "c"), ("a", "bc"), ("ab", "C"), ("abc", ""))}
    assert len(digests) == 4
    verdict = judge((round_of("first", "abc"), round_of("then", "abcd")), is_promised=True)
    assert (verdict.differences[0].position, verdict.differences[0].got, verdict.exit_code) == (3, "d", 1)
    assert judge((round_of("first", "abc"), round_of("then", "abc")), is_promised=True).exit_code == 0


def test_answers_that_do_not_finish_fail_the_demo() -> None:
    def refusing(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
        if body["seed"] == PROMPTS[0].seed:
            raise Refusal(503, {"error": {"message": "later"}})
        if body["seed"] == PROMPTS[1].seed:
            return ["cut"]
        if body["seed"] == PROMPTS[2].seed:
            return ["half", {"error": {"message": "lost \x1b[31m"}}]
        return ["whole", event_of("", finish_reason="stop")]

    with other_server(refusing) as server:
        result, printed = run(DemoOptions(url=server.url, prompts=PROMPTS))
    assert [done.num_finished for done in result.rounds] == [1, 1]
    assert result.verdict.exit_code == 1 and len(result.verdict.errors) == 6
    assert "prompt 1: " in printed and "answered 503: later" in printed
    assert "prompt 2: the stream ended with the finish reason None" in printed
    assert "prompt 3: the server ended the answer: lost \\x1b[31m" in printed
    assert [each.text for each in result.rounds[0].outcomes] == ["", "cut", "half", "whole"]


def test_nobody_there() -> None:
    with pytest.raises(ApiError, match="no server answers at"):
        run(DemoOptions(url="http://127.0.0.1:9"))


async def test_each_kill_waits_until_all_streams_have_moved_again() -> None:
    watch = Watch((Stream(), Stream()))
    log: list[str] = []
    pids = [11]

    async def find(previous: int | None) -> int | None:
        return None if pids[-1] == previous else pids[-1]

    def kill(pid: int) -> None:
        log.append(f"kill {pid}")

    def event(number: int) -> None:
        watch.streams[number].num_events += 1
        watch.streams[number].text += "xxxxx"
        log.append(f"event {number}")
        watch.tell()

    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0.01)

    killing = asyncio.create_task(make_killer(find, kill, num_kills=2, num_characters=1, seed=3)(watch))
    event(0)
    await settle()
    event(1)
    await settle()
    event(0)  # of the engine that died: no sign of life
    pids.append(12)
    await settle()
    event(1)
    await settle()
    event(0)
    await settle()
    watch.streams[0].is_over = watch.streams[1].is_over = True
    watch.tell()
    await killing
    assert log == ["event 0", "event 1", "kill 11", "event 0", "event 1", "event 0", "kill 12"]
    assert [kill.pid for kill in watch.kills] == [11, 12]
    assert watch.kills[0].pause is not None and watch.kills[1].pause is None


def test_only_engines_of_this_machine_are_killed() -> None:
    """A server may name any process: not even our own is ended because it says so."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        url = "http://127.0.0.1:8000"
        with pytest.raises(ApiError, match="is no engine of Headwater"):
            kill_engine(bystander.pid, url=url, is_given=False)
        assert bystander.poll() is None
        assert why_not_killable("http://example.org", os.getpid()) == "the server is on another machine"
        assert "is not to be seen" in str(why_not_killable(url, 2**22 + 1))
        kill_engine(bystander.pid, url=url, is_given=True)
        assert bystander.wait(10) == -9
        with pytest.raises(ApiError, match="cannot kill process"):
            kill_engine(bystander.pid, url=url, is_given=True)
    finally:
        bystander.kill()
        bystander.communicate()


async def test_a_round_together_is_together() -> None:
    """Every answer waits for all requests: one after another it would never end."""
    barrier = threading.Barrier(len(PROMPTS), timeout=10)

    def waiting(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
        barrier.wait()
        return ["a", event_of("", finish_reason="stop")]

    with other_server(waiting) as server:
        async with httpx.AsyncClient(**client_options(server.url, key=None)) as http:
            done = await run_round("r", Ask(http, "m", 8, PROMPTS), together=True)
    assert done.num_finished == len(PROMPTS) and 0 < done.longest_pause <= done.seconds


def test_lines_fit_a_terminal_of_eighty_columns() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80)
    one = round_of("together, 5 × kill -9", *["x"] * 16)
    show_head(console, ("head",))
    show_round(console, one)
    show_verdict(console, (one, one), judge((one, one), is_promised=True), notes=())
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "16/16" in out.getvalue() and one.digest[:16] in out.getvalue()
