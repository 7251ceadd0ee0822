"""The scorecard tells a server that keeps its promises from one that says yes to everything."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loadtest.scorecard.command import CHECKS, check_all
from loadtest.scorecard.finding import Finding, Verdict, counted
from loadtest.scorecard.page import Card, render
from loadtest.scorecard.target import Target
from tests.e2e.serving import serve_default_model

ON_THE_WIRE = ["fields", "nonsense", "stop strings", "characters", "usage", "aborts", "kill -9"]


class Careless(BaseHTTPRequestHandler):
    """Reads a few fields, ignores all others, cuts characters in two and forgets to stop."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        known = {"/v1/models": {"data": [{"id": "careless"}]}}
        self._answer(json.dumps(known.get(self.path, {})).encode(), "application/json")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        try:
            body: dict[str, Any] = json.loads(content)
        except ValueError:
            body = {}
        text = "ab 你好 " * 12
        usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 11}
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        if not body.get("stream"):
            self._answer(json.dumps({"choices": [choice], "usage": usage}).encode(), "application/json")
            return
        pieces = [text.encode()[start : start + 4].decode("utf-8", "replace") for start in range(0, 60, 4)]
        events = [{"choices": [choice | {"text": piece}]} for piece in pieces]
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._answer(lines.encode(), "text/event-stream")

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def careless() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


async def found(target: Target, names: list[str]) -> dict[str, Finding]:
    return {finding.check: finding for finding in await check_all(target, names, lambda _: None)}


async def test_a_careless_server_fails(careless: str) -> None:
    findings = await found(Target(careless), ON_THE_WIRE)
    verdicts = {name: finding.verdict for name, finding in findings.items()}
    assert verdicts["fields"] is Verdict.PARTLY and "a field nobody knows" in findings["fields"].detail
    assert verdicts["nonsense"] is Verdict.FAIL
    assert verdicts["stop strings"] is Verdict.FAIL
    assert verdicts["characters"] is Verdict.FAIL
    assert verdicts["usage"] is not Verdict.PASS
    assert verdicts["aborts"] is verdicts["kill -9"] is Verdict.NOT_RUN


async def test_this_server_passes(tmp_path: Path) -> None:
    with serve_default_model(tmp_path / "log") as (process, url):
        findings = await found(Target(url, pid=process.pid), ["fields", "nonsense", "usage", "aborts"])
    assert {name for name, finding in findings.items() if finding.verdict is not Verdict.PASS} == set(), findings


def test_the_page_has_a_row_for_each_check() -> None:
    finding = Finding("rows", Verdict.FAIL, "3 of 15 texts")
    card = Card("x", "Server X", "bf16", "1.0", "a machine", "2026-01-01", (finding,))
    page = render([card])
    assert "| Is the text the same alone" in page and "| no |" in page
    assert page.count("not run") >= len(CHECKS) - 1
    assert "- rows: fail. 3 of 15 texts." in page


@pytest.mark.parametrize(
    ("good", "total", "verdict"), [(3, 3, Verdict.PASS), (0, 3, Verdict.FAIL), (1, 3, Verdict.PARTLY)]
)
def test_counts_become_verdicts(good: int, total: int, verdict: Verdict) -> None:
    assert counted("rows", good, total, "texts").verdict is verdict
    assert counted("rows", 0, 0, "texts").verdict is Verdict.NOT_RUN
