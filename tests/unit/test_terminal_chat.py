"""`headwater chat` and `headwater complete` against a small server: as programs, and the chat's commands inside."""

import io
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from app.terminal.chat import HELP, Chat, Conversation
from app.terminal.wire import Api
from tests.terminal_server import OtherServer, Refusal, event_of, other_server

ROOT = Path(__file__).parents[2]
TEXT = ["你好", " 🌍", "\u2028", "\x1b[2J\r\n", "end"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "app.cli", *arguments]


def run(*arguments: str, typed: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), input=typed, capture_output=True, cwd=ROOT, timeout=30, check=False)


def say(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
    """Answer with `TEXT`."""
    return [*TEXT, event_of("", is_chat="chat" in path, finish_reason="stop")]


def chat(server: OtherServer, *lines: str) -> str:
    """What a chat prints when these lines are typed."""
    typed = iter(lines)
    out = io.StringIO()

    def read_line() -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    with Api(server.url) as api:
        Chat(api, Conversation(model="m"), read_line=read_line, sink=out).run()
    return out.getvalue()


def test_complete_copies_the_completion() -> None:
    options = ["--max-tokens", "9", "--temperature", "0", "--seed", "3"]
    with other_server(say) as server:
        done = run("complete", "--url", server.url, *options, typed="Hi 你\n".encode())
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "".join(TEXT), b"")
    sent = {"prompt": "Hi 你\n", "max_tokens": 9, "temperature": 0.0, "seed": 3, "model": "other-model", "stream": True}
    assert server.bodies == [sent]


@pytest.mark.parametrize(
    ("events", "out", "error"),
    [
        (["half"], b"half", b"the answer is not whole"),
        (
            ["half", {"error": {"message": "engine lost"}}],
            b"half",
            b"headwater: the server ended the answer: engine lost",
        ),
        (None, b"", b"answered 429: too many"),
    ],
)
def test_complete_fails_aloud(events: list[str | dict[str, Any]] | None, out: bytes, error: bytes) -> None:
    def failing(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
        if events is None:
            raise Refusal(429, {"error": {"message": "too many"}})
        return events

    with other_server(failing) as server:
        done = run("complete", "--url", server.url, typed=b"Hi")
    assert (done.returncode, done.stdout) == (1, out)
    assert error in done.stderr and b"Traceback" not in done.stderr


def test_complete_refuses_what_is_no_text() -> None:
    done = run("complete", "--url", "http://127.0.0.1:9", typed=b"a\xff")
    assert (done.returncode, done.stderr) == (1, b"headwater: standard input is not UTF-8: byte 1 is 0xff\n")


def test_chat_keeps_the_conversation() -> None:
    with other_server(say) as server:
        printed = chat(
            server, "one", "/system Be brief.", "/set temperature 0.2", "/set stop END", "two", "/clear", "x"
        )
    first, second, third = server.bodies
    assert first == {"model": "m", "stream": True, "messages": [{"role": "user", "content": "one"}]}
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "".join(TEXT)},
        {"role": "user", "content": "two"},
    ]
    assert (second["temperature"], second["stop"]) == (0.2, "END")
    assert [message["content"] for message in third["messages"]] == ["Be brief.", "x"]
    assert printed.startswith("你好 🌍\u2028\\x1b[2J\\x0d\nend\n") and "\x1b" not in printed


def test_chat_shows_reasoning_and_does_not_keep_it() -> None:
    def think(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
        thoughts = [{"choices": [{"index": 0, "delta": {"reasoning_content": text}}]} for text in ("Hm", ", so.")]
        return [*thoughts, event_of("Yes.", is_chat=True), event_of("", is_chat=True, finish_reason="stop")]

    with other_server(think) as server:
        printed = chat(server, "one", "two")
    assert printed.startswith("(thinking) Hm, so.\n\nYes.\n")
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "Yes."}


def test_chat_commands() -> None:
    with other_server(say) as server:
        lines = ("/help", "/set", "/set a [1]", "/set", "/set a", "/set", "/set model x", "/nope", "", "^C", "/system")
        printed = chat(server, *lines, "/quit", "not asked")
    assert printed == (
        f'{HELP}\nnothing is set\na is [1]\n{{"a": [1]}}\na is left to the server\nnothing is set\n'
        "model is not set here\nno command /nope; /help lists them\n\n(/quit or Ctrl-D leaves)\n"
        "there is no system prompt\n"
    )
    assert server.bodies == []


def test_chat_says_what_is_missing_and_goes_on() -> None:
    refusals: list[tuple[int, object]] = [
        (404, {"detail": "Not Found"}),
        (404, {"error": {"message": "no model m", "code": "model_not_found"}}),
        (400, {"error": {"message": "this model has no chat template"}}),
    ]

    def answer(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
        if refusals:
            raise Refusal(*refusals.pop(0))
        return ["cut", event_of("", is_chat=True, finish_reason="length")]

    with other_server(answer) as server:
        printed = chat(server, "one", "two", "three", "four").splitlines()
    assert printed[0] == "(this server has no /v1/chat/completions; `headwater complete` needs /v1/completions alone)"
    assert printed[1].endswith("answered 404: no model m)") and printed[2].endswith("has no chat template)")
    assert printed[3:] == ["cut", "(cut off: /set max_tokens N allows more)"]
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["four"]


def test_chat_goes_on_after_what_is_no_text() -> None:
    with other_server(say) as server:
        done = run("chat", "--url", server.url, typed=b"a\xff\nb\n")
    assert done.returncode == 0 and done.stdout.startswith(b"(what was typed is not UTF-8, and was not sent)\n")
    assert [message["content"] for body in server.bodies for message in body["messages"]] == ["b"]


def test_chat_ends_quietly_where_nobody_reads() -> None:
    with (
        other_server(say) as server,
        subprocess.Popen(
            command("chat", "--url", server.url),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as program,
    ):
        assert program.stdin is not None and program.stdout is not None and program.stderr is not None
        program.stdout.close()
        program.stdin.write(b"go\n")
        program.stdin.close()
        assert b"Traceback" not in program.stderr.read()
    assert program.returncode == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    def endless(path: str, body: dict[str, Any]) -> Iterable[str | dict[str, Any]]:
        if len(body["messages"]) > 1:
            return ["again", event_of("", is_chat=True, finish_reason="stop")]
        return iter(lambda: "on and on ", None)

    with other_server(endless) as server:
        program = subprocess.Popen(
            command("chat", "--url", server.url),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Tests in the background of a shell inherit that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert program.stdin is not None and program.stdout is not None
        program.stdin.write(b"go\n")
        program.stdin.flush()
        assert program.stdout.read(9) == b"on and on"
        program.send_signal(signal.SIGINT)
        rest, _ = program.communicate(b"more\n/quit\n", timeout=30)
        assert server.cut_off.wait(10)
    assert program.returncode == 0
    assert rest.endswith(b"\n(stopped)\nagain\n")
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.bodies[1]["messages"][1]["content"].startswith("on and on ")
