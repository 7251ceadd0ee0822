"""The load test against a scripted server on a real socket: what each ending is counted as."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.record import Outcome, RequestRecord
from loadtest.run import RunConfig, RunResult, request_body, run_load

Answer = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]


class ScriptedServer:
    """Reads requests, keeps their bodies and answers each with `answer`."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict[str, object]] = []
        self.heads: list[str] = []
        self.num_connections = 0
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedServer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                if head.startswith("GET /v1/models "):
                    await _reply(writer, 200, b'{"data": [{"id": "m"}]}')
                    continue
                length = int(head.lower().partition("content-length:")[2].split()[0])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await self.answer(self.bodies[-1], writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def _reply(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


async def _send(writer: asyncio.StreamWriter, data: bytes, *, size: int = 7) -> None:
    """Chunked, and cut into chunks that split events and characters."""
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    await writer.drain()


async def _begin(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    await writer.drain()


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


TEXTS = [
    {"choices": [{"index": 0, "text": ""}]},
    {"choices": [{"index": 0, "text": "你"}]},
    {"choices": [{"index": 0, "text": "好😀", "finish_reason": None}]},
]
LAST = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}},
}


async def _whole(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
    await _begin(writer)
    events = b": keep-alive\n\n" + b"".join(map(_event, [*TEXTS, LAST, USAGE])) + b"data: [DONE]\n\n"
    await _send(writer, events)
    writer.write(b"0\r\n\r\n")


async def _load(server: ScriptedServer, **settings: object) -> RunResult:
    config = RunConfig(**({"url": server.url, "num_requests": 1, "timeout_s": 20.0} | settings))  # type: ignore[arg-type]
    seen: list[RequestRecord] = []
    result = await run_load(config, targets={"e2e": 1e6}, api_key="k", progress=seen.append)
    assert sorted(record.index for record in seen) == list(range(config.num_requests))
    return result


async def test_a_whole_stream_is_measured() -> None:
    async with ScriptedServer(_whole).running() as server:
        result = await _load(server, num_requests=6, concurrency=2, num_warmups=2, input_len=5, output_len=4)
        assert server.num_connections == 2
    (first, *_) = result.records
    assert first.outcome is Outcome.COMPLETED
    assert (first.prompt_tokens, first.output_tokens, first.cached_tokens) == (9, 4, 3)
    assert (len(first.output_ns), first.finish_reason, first.lag) == (2, "length", 0)
    assert first.sent_ns <= first.output_ns[0] <= first.output_ns[1] <= first.end_ns
    assert (result.summary.completed, result.config.model) == (6, "m")
    assert len(server.bodies) == 8
    assert server.bodies[2] == request_body(result.config, 0)
    assert len({str(body["prompt"]) for body in server.bodies}) == 8
    assert "Authorization: Bearer k" in server.heads[-1]


async def test_a_connection_for_each_request_where_none_may_be_used_again() -> None:
    async with ScriptedServer(_whole).running() as server:
        result = await _load(server, num_requests=4, keep_alive=False, model="m")
        assert server.num_connections == 4
    assert result.summary.completed == 4
    assert all("Connection: close" in head for head in server.heads)


async def test_chat_is_measured_from_its_first_content() -> None:
    async def chat(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        assert body["messages"] == [{"role": "user", "content": body["messages"][0]["content"]}]  # type: ignore[index]
        await _begin(writer)
        deltas = [{"role": "assistant", "content": ""}, {"content": "你"}, {}]
        reasons = [None, None, "stop"]
        pairs = zip(deltas, reasons, strict=True)
        await _send(writer, b"".join(_event({"choices": [{"delta": d, "finish_reason": r}]}) for d, r in pairs))
        writer.write(b"0\r\n\r\n")

    async with ScriptedServer(chat).running() as server:
        (record,) = (await _load(server, endpoint="chat")).records
    assert (record.outcome, len(record.output_ns), record.output_tokens) == (Outcome.COMPLETED, 1, 1)


async def test_an_open_loop_sends_whatever_the_server_does() -> None:
    """No answer comes before all 20 requests are there: a closed loop of fewer would wait for ever."""
    all_there = asyncio.Barrier(20)

    async def answer(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await all_there.wait()
        await _whole(body, writer)

    async with ScriptedServer(answer).running() as server:
        result = await _load(server, num_requests=20, rate=500.0, prompt_kind="token-ids", input_len=3)
    assert (result.summary.completed, result.summary.offered_rate) == (20, 500.0)
    assert all(record.lag >= 0 for record in result.records)
    starts = [record.scheduled_ns for record in result.records]
    assert starts == sorted(starts)
    assert all(len(body["prompt"]) == 3 for body in server.bodies)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "body", "outcome", "detail"),
    [
        (429, b'{"error": {"message": "queue is full"}}', Outcome.REFUSED, "429 queue is full"),
        (503, b'{"error": "starting"}', Outcome.REFUSED, "503 starting"),
        (400, b'{"object": "error", "message": "no such field"}', Outcome.HTTP_ERROR, "400 no such field"),
        (500, b"<html>oops</html>", Outcome.HTTP_ERROR, "500 <html>oops</html>"),
    ],
)
async def test_refusals_and_errors_by_kind(status: int, body: bytes, outcome: Outcome, detail: str) -> None:
    async def answer(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await _reply(writer, status, body)

    async with ScriptedServer(answer).running() as server:
        result = await _load(server, num_requests=2, concurrency=1)
        assert server.num_connections == 1
    assert [(record.outcome, record.detail, record.status) for record in result.records] == [
        (outcome, detail, status)
    ] * 2
    assert result.summary.errors == {detail: 2}


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([*TEXTS, {"error": {"message": "the engine died"}}], Outcome.STREAM_ERROR),
        ([*TEXTS, "no chunk"], Outcome.STREAM_ERROR),
        (TEXTS, Outcome.TRUNCATED),
    ],
)
async def test_streams_that_end_badly(events: list[object], outcome: Outcome) -> None:
    async def answer(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await _begin(writer)
        await _send(writer, b"".join(map(_event, events)) + b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    async with ScriptedServer(answer).running() as server:
        (record,) = (await _load(server)).records
    assert (record.outcome, len(record.output_ns)) == (outcome, 2)


async def test_connections_that_break() -> None:
    async def hang_up(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await _begin(writer)
        await _send(writer, _event(TEXTS[1]))
        writer.close()

    async def nonsense(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-hello\r\n\r\n")

    async def silence(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await _begin(writer)

    cases = (
        (hang_up, 20.0, Outcome.CONNECTION),
        (nonsense, 20.0, Outcome.CONNECTION),
        (silence, 0.05, Outcome.TIMEOUT),
    )
    for answer, timeout_s, outcome in cases:
        async with ScriptedServer(answer).running() as server:
            (record,) = (await _load(server, timeout_s=timeout_s)).records
        assert record.outcome is outcome, answer.__name__
    async with ScriptedServer(_whole).running() as server:
        pass
    (record,) = (await _load(server, model="m")).records
    assert (record.outcome, record.sent_ns) == (Outcome.CONNECTION, 0)
    with pytest.raises(ValueError, match="names no model"):
        await _load(server)


async def test_the_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedServer(_whole).running() as server:
        arguments = ["run", "--url", server.url + "/v1/", "--num-requests", "3", "--goodput", "ttft:1000", "tpot:100"]
        folder = tmp_path / "out"
        assert await asyncio.to_thread(main, [*arguments, "--output", str(folder), "--extra-body", '{"top_k": 1}']) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["summary"]["completed"], summary["config"]["goodput"]) == (3, ["ttft:1000", "tpot:100"])
    assert len((folder / "requests.jsonl").read_text().splitlines()) == 3
    assert (folder / "plot.svg").read_text().startswith("<svg")
    assert server.bodies[0]["top_k"] == 1
    shown = capsys.readouterr().out
    assert "TTFT" in shown and "goodput" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "ftp://x"],
        ["--num-requests", "0"],
        ["--shared-prefix", "2"],
        ["--num-warmups", "-1"],
        ["--vocab-size", "1"],
        ["--goodput", "speed:1"],
        ["--model", "m", "--rate", "0"],
        ["--extra-body", "[]"],
    ],
)
def test_settings_that_cannot_be_run_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.startswith("loadtest: ")
