"""`headwater reload` and SIGHUP on real servers: nothing is lost, and what is told of it is true."""

import asyncio
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import free_port, serve_default_model, started, wait_ready

RILL = Path(__file__).parents[2] / "models" / "rill-stories-3m"
STEP_SECONDS = 0.04


def make_model(folder: Path, **config: object) -> Path:
    """A folder that is served without its weights; another config is another fingerprint."""
    shutil.copytree(RILL, folder, ignore=shutil.ignore_patterns("*.md"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def point(link: Path, folder: Path) -> None:
    """Let the name mean another folder, at once."""
    new = link.with_name("new")
    new.symlink_to(folder)
    new.replace(link)


@contextmanager
def serving(tmp_path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server of the scripted tier on the folder that `tmp_path / "current"` means; every step takes 40 ms."""
    port, log = free_port(), tmp_path / "log"
    point(tmp_path / "current", make_model(tmp_path / "one"))
    vocab_size = json.loads((RILL / "config.json").read_text())["vocab_size"]
    script = json.dumps({"vocab_size": vocab_size, "step_seconds": STEP_SECONDS, "max_model_len": 2048})
    command = ["-m", "app.cli", "serve", str(tmp_path / "current"), "--tier", "scripted", "--scripted", script]
    with started(log, *command, "--port", str(port), "--served-model-name", "m", *flags) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log)
        yield process, url


def request(**fields: object) -> dict[str, object]:
    return {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0, "ignore_eos": True, **fields}


async def reload(process: subprocess.Popen[bytes]) -> tuple[int | None, list[str]]:
    """Exit code and lines of the command."""
    command = [sys.executable, "-m", "app.cli", "reload", "--pid", str(process.pid)]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    out, _ = await child.communicate()
    return child.returncode, out.decode().splitlines()


class Stream:
    """A streamed answer, read as it comes."""

    def __init__(self, client: httpx.AsyncClient, **fields: object) -> None:
        self._client = client
        self._body = request(stream=True, **fields)
        self.began = asyncio.Event()
        self.events: list[dict[str, Any]] = []
        self.last_id = ""
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with self._client.stream("POST", "/v1/completions", json=self._body) as response:
            async for line in response.aiter_lines():
                if line.startswith("id: "):
                    self.last_id = line[4:]
                if line.startswith("data: {"):
                    self.events.append(json.loads(line[6:]))
                    self.began.set()

    @property
    def text(self) -> str:
        return "".join(event["choices"][0]["text"] for event in self.events)

    @property
    def fingerprints(self) -> set[str]:
        return {event["system_fingerprint"] for event in self.events}


async def ask(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=request(**fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def facts(client: httpx.AsyncClient) -> tuple[str, str]:
    """The fingerprint as both routes tell it, and the state."""
    ready, models = (await client.get("/ready")).json(), (await client.get("/v1/models")).json()
    assert ready["fingerprint"] == models["data"][0]["fingerprint"]
    return ready["fingerprint"], ready["state"]


def agree(one: str, other: str) -> bool:
    """Whether they are one answer, each so far as it went."""
    return bool(one and other) and (one.startswith(other) or other.startswith(one))


async def test_the_same_model_goes_on_in_another_engine_and_another_loads_beside(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            first, engine = await facts(client), (await client.get("/ready")).json()["engine_pid"]
            stream = Stream(client)
            await stream.began.wait()
            code, lines = await reload(process)
            assert code == 0 and "same model" in lines[0] and "handed over" in lines[0] and "engine 2" in lines[1]
            assert (await client.get("/ready")).json()["engine_pid"] != engine and await facts(client) == first
            asked = {"max_tokens": 1500, "stream_options": {"resumable": True}}  # longer than the test takes
            long = Stream(client, **asked)
            await asyncio.gather(stream.reading, long.began.wait())
            assert stream.events[-1]["choices"][0]["finish_reason"] == "length" and stream.fingerprints == {first[0]}

            point(tmp_path / "current", make_model(tmp_path / "two", rope_theta=5.0))
            code, lines = await reload(process)
            assert code == 0 and "another model" in lines[0] and "beside" in lines[0] and "engine 3" in lines[1]
            second = await facts(client)
            assert second[0] != first[0] and second[1] == "ready" and second[0] in lines[1]
            gauges = (await client.get("/metrics")).text
            assert 'headwater_num_requests_running{engine="leaving",model_name="m"} 1.0' in gauges
            assert 'headwater_num_requests_running{engine="0",model_name="m"} 0.0' in gauges
            code, lines = await reload(process)
            assert code == 1 and "still finishes" in lines[0]
            answer = await ask(client, max_tokens=5)
            assert answer["system_fingerprint"] == second[0]
            # By an engine that nobody disturbed, and by two: the same.
            assert agree(stream.text, answer["choices"][0]["text"]) and agree(stream.text, long.text)
            assert long.fingerprints == {first[0]} and not long.reading.done()
            long.reading.cancel()
            refused = await client.post(
                "/v1/completions", json=request(stream=True, **asked), headers={"last-event-id": long.last_id}
            )
            assert refused.status_code == 409 and refused.json()["error"]["code"] == "fingerprint_differs"

            (tmp_path / "three").mkdir()
            point(tmp_path / "current", tmp_path / "three")
            while (refusal := await reload(process))[1][-1].count("still finishes"):
                pass
            assert refusal[0] == 1 and len(refusal[1]) == 1 and refusal[1][0].startswith("not reloaded: ")
            assert "three" in refusal[1][0] and await facts(client) == second
            assert (await ask(client, max_tokens=2))["system_fingerprint"] == second[0]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


async def test_where_one_engine_may_run_new_requests_wait_for_the_next(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests under nohup has it ignored
    try:
        with serving(tmp_path, "--reload-overlap", "never") as (process, url):
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                first = await facts(client)
                long = Stream(client, max_tokens=1500)
                await long.began.wait()
                point(tmp_path / "current", make_model(tmp_path / "two", rope_theta=5.0))
                process.send_signal(signal.SIGHUP)
                while (await facts(client))[1] == "ready":
                    pass
                held = asyncio.create_task(ask(client, max_tokens=5))
                assert await facts(client) == (first[0], "draining") and not long.reading.done()
                long.reading.cancel()
                answer = await held
                assert long.fingerprints == {first[0]} != {answer["system_fingerprint"]}
                assert await facts(client) == (answer["system_fingerprint"], "ready")
                assert agree(long.text, answer["choices"][0]["text"])
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal's two ends; the first one is closed by whoever wants."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(theirs)


def test_a_server_whose_terminal_is_closed_drains(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    point(tmp_path / "current", make_model(tmp_path / "one"))
    code = (
        "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(int(sys.argv[1]), termios.TIOCSCTTY, 0);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); sys.argv[:2] = ['headwater'];"
        "from app.cli import main; sys.exit(main())"
    )
    with terminal() as (ours, theirs):
        os.set_inheritable(theirs, True)
        command = [sys.executable, "-c", code, str(theirs), "serve", str(tmp_path / "current"), "--tier", "scripted"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--port", str(port)], stdout=output, stderr=output, pass_fds=(theirs,)
            )
        try:
            wait_ready(process, f"http://127.0.0.1:{port}", log)
            os.close(ours)
            assert process.wait(20) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert "not ready any more" in log.read_text()


@pytest.mark.slow
async def test_streams_of_the_default_model_are_the_same_through_reloads(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = [
        {"prompt": f"{index} reasons to go", "max_tokens": 200, "temperature": index % 2, "seed": index}
        for index in range(8)
    ]
    with serve_default_model(tmp_path / "log") as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            answers = await asyncio.gather(*(ask(client, **fields) for fields in asked))
            streams = [Stream(client, **fields) for fields in asked]
            await asyncio.gather(*(stream.began.wait() for stream in streams))
            for _ in range(3):
                assert (await reload(process))[0] == 0
            await asyncio.gather(*(stream.reading for stream in streams))
            assert (await client.get("/ready")).json()["generation"] == 4
    assert [stream.text for stream in streams] == [answer["choices"][0]["text"] for answer in answers]


@pytest.mark.slow
async def test_where_one_engine_may_run_a_model_that_does_not_load_gives_way_to_the_one_before(tmp_path: Path) -> None:
    port, log, link = free_port(), tmp_path / "log", tmp_path / "current"
    point(link, make_model(tmp_path / "one"))
    flags = ("--port", str(port), "--reload-overlap", "never", "--kv-cache-gib", "0.1", "--tier", "native")
    with started(log, "-m", "app.cli", "serve", str(link), *flags) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            first, before = await facts(client), await ask(client)
            point(link, make_model(tmp_path / "two", hidden_size=384))
            code, lines = await reload(process)
            assert code == 1 and len(lines) == 2 and "loaded again" in lines[1] and "shape" in lines[1]
            after = await ask(client)
            assert await facts(client) == first and after["choices"][0]["text"] == before["choices"][0]["text"]
            point(link, make_model(tmp_path / "three", rope_theta=5.0))
            assert (await reload(process))[0] == 0
            assert (await ask(client))["system_fingerprint"] != before["system_fingerprint"]
