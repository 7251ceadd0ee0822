"""The server under the checks: its address, its model, its processes, and plain requests to it.

Everything is bounded: a server that does not answer costs a check its timeout, never the run.
"""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtest.compare.server import tree
from loadtest.sse import EventParser

Body = dict[str, Any]

TIMEOUT_S = 60.0


@dataclass
class Answer:
    """What came of one completion: streamed or not."""

    status: int = 0
    """0: the connection failed."""
    text: str = ""
    """Of choice 0."""
    pieces: list[str] = field(default_factory=list)
    """Text of choice 0 as the events brought it."""
    num_choices: int = 0
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    logprobs: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    is_whole: bool = False
    """It ended as the protocol says: a JSON body, or [DONE] without an error event before it."""
    seconds: float = 0.0
    longest_pause: float = 0.0
    """Between two events of a stream, seconds."""


class Target:
    """One server. Use as an async context manager."""

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, pid: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`pid` is the server's process, for the checks that kill; `extra` are fields of every request."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.pid = pid
        self.model = model
        self._extra = dict(extra or {})
        self._api_key = api_key
        self._http = self._new_client()

    def _new_client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, headers=headers, limits=limits, trust_env=False)

    async def __aenter__(self) -> "Target":
        if self.model is None:
            models = (await self._http.get("/v1/models")).json()["data"]
            self.model = str(models[0]["id"])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def body(self, prompt: Any, max_tokens: int = 32, **fields: Any) -> Body:
        """A greedy completion request."""
        fixed = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}
        return fixed | self._extra | fields

    async def get(self, path: str, *, timeout: float = 5.0) -> httpx.Response | None:
        """None where nothing answers in time."""
        try:
            return await self._http.get(path, timeout=timeout)
        except httpx.HTTPError:
            return None

    async def post(self, body: Body | bytes, path: str = "/v1/completions", *, timeout: float = TIMEOUT_S) -> Answer:
        """One answer in one body."""
        began, answer = time.monotonic(), Answer()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            response = await self._http.post(
                path, content=content, headers={"content-type": "application/json"}, timeout=timeout
            )
            answer.status, answer.headers = response.status_code, response.headers
            _read_body(answer, response.text)
        except httpx.HTTPError as error:
            answer.error = type(error).__name__
        answer.seconds = time.monotonic() - began
        return answer

    async def complete(self, prompt: Any, max_tokens: int = 32, **fields: Any) -> Answer:
        """`post` of `body`."""
        return await self.post(self.body(prompt, max_tokens, **fields))

    async def stream(self, prompt: Any, max_tokens: int = 32, *, timeout: float = TIMEOUT_S, **fields: Any) -> Answer:
        """The same as server-sent events, with the final usage."""
        began, answer = time.monotonic(), Answer()
        body = self.body(prompt, max_tokens, stream=True, stream_options={"include_usage": True}, **fields)
        try:
            async with asyncio.timeout(timeout), self.open(body) as response:
                answer.status, answer.headers = response.status_code, response.headers
                await _read_events(answer, response)
        except (httpx.HTTPError, TimeoutError) as error:
            answer.error = answer.error or type(error).__name__
        answer.seconds = time.monotonic() - began
        answer.text = "".join(answer.pieces)
        return answer

    def open(self, body: Body) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        """A response whose body is read by the caller, or left."""
        return self._http.stream("POST", "/v1/completions", json=body, timeout=TIMEOUT_S)

    async def gauges(self) -> dict[str, float] | None:
        """Gauges of running and waiting requests by name, summed over labels; None without /metrics."""
        response = await self.get("/metrics")
        if response is None or response.status_code != 200:
            return None
        found: dict[str, float] = {}
        for line in response.text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name.rpartition(":")[2].removeprefix("headwater_") in RUNNING_GAUGES:
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
        return found or None

    def model_pid(self) -> int | None:
        """Of the server's processes the one with the most memory: the one that holds the model."""
        if self.pid is None:
            return None
        members = [(_resident_bytes(pid), pid) for pid in tree(self.pid)]
        return max(members)[1] if members and max(members)[0] else None

    @contextlib.asynccontextmanager
    async def stopped(self, pid: int) -> AsyncIterator[None]:
        """The process is stopped inside, and goes on afterwards where it is still there."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def answers_within(self, seconds: float) -> float | None:
        """Seconds until a completion is answered well; None where that takes longer."""
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds:
            if (await self.post(self.body("a", 1), timeout=5.0)).status == 200:
                return elapsed
            await asyncio.sleep(0.1)
        return None


RUNNING_GAUGES = frozenset(
    {"num_requests_running", "num_requests_waiting", "requests_processing", "requests_deferred", "num_live_sequences"}
)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def _read_body(answer: Answer, text: str) -> None:
    try:
        content = json.loads(text)
    except ValueError:
        answer.error = text[:200]
        return
    answer.is_whole = True
    if not isinstance(content, dict) or content.get("error") or not content.get("choices"):
        answer.error = str(content.get("error") if isinstance(content, dict) else content)[:300] or "no choices"
        return
    choice = content["choices"][0]
    answer.num_choices = len(content["choices"])
    answer.text = str(choice.get("text") or "")
    answer.finish_reason, answer.logprobs = choice.get("finish_reason"), choice.get("logprobs")
    answer.usage = content.get("usage")


async def _read_events(answer: Answer, response: httpx.Response) -> None:
    parser, last = EventParser(), time.monotonic()
    if response.status_code != 200:
        answer.error = (await response.aread()).decode("utf-8", "replace")[:300]
        return
    indices: set[int] = set()
    async for data in response.aiter_bytes():
        for event in parser.feed(data):
            now = time.monotonic()
            answer.longest_pause, last = max(answer.longest_pause, now - last), now
            if event == b"[DONE]":
                answer.is_whole = not answer.error
                continue
            chunk = json.loads(event.decode("utf-8", "surrogateescape"))
            if chunk.get("error"):
                answer.error = str(chunk["error"])[:300]
            answer.usage = chunk.get("usage") or answer.usage
            for choice in chunk.get("choices") or ():
                indices.add(choice["index"])
                if choice["index"] == 0:
                    answer.pieces.append(choice.get("text") or "")
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    answer.num_choices = len(indices)
