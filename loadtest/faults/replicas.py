"""Whole servers in processes of their own, which share nothing but the model's files, and streams that outlive them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.terminal.resume import ResumingStream

Body = dict[str, Any]

START_SECONDS = 60.0
WAIT_SECONDS = 60.0
STREAM_SECONDS = 120.0
POLL_SECONDS = 0.01
_RESUMED = re.compile(r'^headwater_streams_resumed_total\{.*source="(\w+)"\} ([0-9.]+)$', re.MULTILINE)
_LIVE = re.compile(r"^headwater_num_requests_(?:running|waiting)\{.*\} ([0-9.]+)$", re.MULTILINE)


class Replica:
    """One server. Its port stays the same when it is started again."""

    def __init__(self, *flags: str, stalls: Path | None = None) -> None:
        """`stalls`: where `loadtest.watched_server` tells of its event loop."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        module = ["app.cli"] if stalls is None else ["loadtest.watched_server", str(stalls)]
        self._command = [sys.executable, "-P", "-m", *module, "serve", "--port", str(self.port), *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self._engine_pid: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it is ready, at once where it runs. Raises RuntimeError where it is not ready in time."""
        if self._process is not None:
            return
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": os.getcwd()},
            start_new_session=True,
        )
        if not wait_for(self._is_ready, seconds=START_SECONDS):
            self.kill()
            raise RuntimeError(f"the server on port {self.port} was not ready after {START_SECONDS:g} s")

    def kill(self) -> float:
        """SIGKILL to the whole of it, engine included; returns when that was."""
        at = time.monotonic()
        if self._process is not None:
            self.kill_engine()
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        return at

    def kill_engine(self) -> None:
        """The engine is in a session of its own."""
        if self._engine_pid is not None:
            with suppress(ProcessLookupError):  # it may have gone with its socket
                os.kill(self._engine_pid, signal.SIGKILL)
            self._engine_pid = None

    def terminate(self) -> None:
        """SIGTERM: it drains."""
        if self._process is not None:
            self._process.terminate()

    @property
    def pid(self) -> int:
        """Of its API process. Raises RuntimeError where it does not run."""
        if self._process is None:
            raise RuntimeError(f"the server on port {self.port} does not run: start it first")
        return self._process.pid

    @property
    def peak_mib(self) -> float:
        """The most resident memory that its API process ever had, in MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

    @property
    def num_live(self) -> int:
        """Sequences in it."""
        return int(sum(float(count) for count in _LIVE.findall(self._metrics())))

    @property
    def num_resumed(self) -> dict[str, int]:
        """Streams that went on here, by where their tokens came from."""
        return {source: int(float(count)) for source, count in _RESUMED.findall(self._metrics())}

    def _metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=WAIT_SECONDS).text

    def _is_ready(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"the server on port {self.port} ended at its start")
        try:
            response = httpx.get(f"{self.url}/ready")
        except httpx.TransportError:
            return False
        self._engine_pid = response.json().get("engine_pid")
        return response.status_code == 200


@contextmanager
def replicas(count: int, *flags: str) -> Iterator[list[Replica]]:
    """So many, ready; none is left behind."""
    servers = [Replica(*flags) for _ in range(count)]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()


@dataclass
class Spoken:
    """What a stream said, however it was divided into events, as bytes that can be compared."""

    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    usage: Any = None
    seed: int | None = None
    num_bytes: int = 0
    """Of text and arguments."""

    def add(self, chunk: dict[str, Any]) -> None:
        """One event."""
        if chunk.get("usage") and not chunk["choices"]:
            self.usage = {name: count for name, count in chunk["usage"].items() if isinstance(count, int)}
            self.seed = chunk["seed"]
        for choice in chunk["choices"]:
            known = self.choices.setdefault(
                choice["index"], {"roles": 0, "text": "", "reasoning": "", "calls": [], "logprobs": {}, "ends": []}
            )
            delta = choice.get("delta") or {}
            self._add_text(known, choice.get("text") or delta.get("content") or "")
            known["roles"] += "role" in delta
            known["reasoning"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                self._add_call(known, call)
            for name, values in (choice.get("logprobs") or {}).items():
                known["logprobs"].setdefault(name, []).extend(values or ())
            if choice.get("finish_reason"):
                known["ends"].append([choice["finish_reason"], choice.get("stop_reason")])

    def as_bytes(self) -> bytes:
        """All that must be the same. Ids of calls are drawn anew by each request."""
        return json.dumps([sorted(self.choices.items()), self.usage], ensure_ascii=False).encode()

    def _add_text(self, known: dict[str, Any], text: str) -> None:
        known["text"] += text
        self.num_bytes += len(text.encode())

    def _add_call(self, known: dict[str, Any], call: dict[str, Any]) -> None:
        if "id" in call:
            known["calls"].append([call["function"]["name"], ""])
        known["calls"][call["index"]][1] += call["function"]["arguments"]
        self.num_bytes += len(call["function"]["arguments"].encode())


@dataclass
class Client:
    """One stream in a thread of its own."""

    kind: str
    path: str
    body: Body
    hands_back: bool = True
    spoken: Spoken = field(default_factory=Spoken)
    num_events: int = 0
    last_at: float = 0.0
    num_cuts: int = 0
    error: str = ""
    leaves_after: int | None = None
    is_over: bool = False
    _thread: threading.Thread | None = None

    def start(self, urls: list[str]) -> None:
        """Ask the first of these servers, and the others when it ends."""
        self._thread = threading.Thread(target=self._run, args=(urls,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the stream."""
        assert self._thread is not None
        self._thread.join(STREAM_SECONDS)
        if self._thread.is_alive():
            self.error = f"no end after {STREAM_SECONDS:g} s"

    def _run(self, urls: list[str]) -> None:
        stream = ResumingStream(
            urls, self.path, with_usage(self.body), hands_back=self.hands_back, patience=WAIT_SECONDS
        )
        chunks = iter(stream)
        try:
            for chunk in chunks:
                self.spoken.add(chunk)
                self.num_events += 1
                self.last_at = time.monotonic()
                if self.num_events == self.leaves_after:
                    return
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            chunks.close()  # type: ignore[attr-defined]  # a generator: leaving closes the connection
            self.num_cuts = stream.num_cuts
            self.is_over = True


def with_usage(body: Body) -> Body:
    """The request as all its runs are sent."""
    return body | {"stream_options": {"include_usage": True}}


def undisturbed(url: str, path: str, body: Body) -> Spoken:
    """What an ordinary stream of the request says, in one piece and without cursors."""
    spoken = Spoken()
    with httpx.Client(timeout=STREAM_SECONDS) as http:
        response = http.post(url + path, json=with_usage(body) | {"stream": True})
    if response.status_code != 200:
        raise RuntimeError(f"the undisturbed run was answered {response.status_code}: {response.text[:200]}")
    for event in response.text.split("\n\n"):
        if event.startswith("data: {"):
            spoken.add(json.loads(event[6:]))
    return spoken


def wait_for(condition: Callable[[], bool], *, seconds: float = WAIT_SECONDS) -> bool:
    """Wait for other processes; False where it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def all_moved(clients: Iterable[Client], since: float) -> bool:
    """Each has had an event since then, or is over."""
    return all(client.is_over or client.last_at > since for client in clients)
