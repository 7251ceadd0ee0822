"""`headwater serve` as a process: signals, exit codes, the banner; on the scripted tier, so that steps last."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.store import default_model
from tests.certificates import make_certificate
from tests.e2e.serving import free_port, started, wait_ready
from tests.store_models import default_model_folder

SLOW_STEPS = {"vocab_size": 49152, "step_seconds": 0.05, "max_model_len": 512}
EXIT_SECONDS = 20


@pytest.fixture(scope="module", autouse=True)
def model() -> None:
    default_model_folder()


@contextmanager
def serving(log: Path, *flags: str, **scripted: object) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server whose every step takes 50 ms, ready."""
    port = free_port()
    script = json.dumps(SLOW_STEPS | scripted)
    command = ["-m", "app.cli", "serve", "--tier", "scripted", "--scripted", script, "--port", str(port), *flags]
    with started(log, *command) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log)
        yield process, url


def command_of(log: Path) -> str:
    """The command that the banner tells to paste, once it is there."""
    deadline = time.monotonic() + 10
    while "\ncurl " not in (text := log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return next(line for line in text.splitlines() if line.startswith("curl "))


def request(**fields: object) -> dict[str, object]:
    return {"model": default_model(), "prompt": "hello", "max_tokens": 40, "ignore_eos": True, "stream": True, **fields}


async def test_a_signal_lets_live_streams_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            async with client.stream("POST", "/v1/completions", json=request()) as stream:
                lines = stream.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                ready = await client.get("/ready")
                for _ in range(500):
                    if ready.status_code != 200:
                        break
                    ready = await client.get("/ready")
                refused = await client.post("/v1/completions", json=request(stream=False))
                rest = [line async for line in lines if line]
            assert ready.json()["state"] == "draining" and (await asyncio.to_thread(process.wait, EXIT_SECONDS)) == 0
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]


async def test_a_second_signal_ends_streams_with_an_error_event(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as (process, url):
        async with (
            httpx.AsyncClient(base_url=url, timeout=30) as client,
            client.stream("POST", "/v1/completions", json=request(max_tokens=400)) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
        assert (await asyncio.to_thread(process.wait, EXIT_SECONDS)) == 0
        assert '"error":' in rest[-2] and rest[-1] == "data: [DONE]"
        assert time.monotonic() - began < 15  # 400 steps would take 20 s


def test_the_banner_says_what_readme_promises(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(log) as (_, url):
        command = command_of(log)
        text = log.read_text()
        for fact in (f"{url}/v1", "Apache-2.0", "scripted", "room for", f"curl {url}/v1/completions"):
            assert fact in text
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
        assert done.stdout.rstrip().endswith("data: [DONE]")


def test_metrics_may_have_an_address_of_their_own(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    with serving(log, "--metrics-listen", f"127.0.0.1:{port}") as (process, url):
        apart = f"http://127.0.0.1:{port}"
        assert "headwater_num_requests_running" in httpx.get(f"{apart}/metrics").text
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert httpx.get(f"{apart}/v1/models").status_code == 404
        assert httpx.get(f"{apart}/metrics", headers={"host": "evil.example"}).status_code == 403
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_SECONDS) == 0
    assert f"metrics at {apart}/metrics" in log.read_text()


def test_metrics_apart_ask_for_keys_as_well(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    keys, scrape = tmp_path / "keys", tmp_path / "scrape"
    keys.write_text("0123456789abcdef\n")
    scrape.write_text("scrape-0123456789abcdef\n")
    flags = ("--metrics-listen", f"127.0.0.1:{port}", "--api-key-file", str(keys), "--metrics-key-file", str(scrape))
    with serving(log, *flags):
        command = command_of(log)
        # A shell that knows no key says so and sends nothing; with one, it streams.
        env = {name: value for name, value in os.environ.items() if name != "HEADWATER_API_KEY"}
        for key, code, said in ((None, 1, "set it to a key of keys"), ("0123456789abcdef", 0, "data: [DONE]")):
            one = env if key is None else env | {"HEADWATER_API_KEY": key}
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, env=one)
            assert (done.returncode != 0) == (code != 0) and said in done.stdout + done.stderr
        address = f"http://127.0.0.1:{port}/metrics"
        assert httpx.get(address).status_code == 401
        for key in ("0123456789abcdef", "scrape-0123456789abcdef"):
            assert httpx.get(address, headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_https_behind_a_path_of_a_proxy(tmp_path: Path) -> None:
    """A proxy may strip the path or leave it: both are answered, and what needs a key needs one either way."""
    certificate, private = make_certificate(tmp_path)
    keys, log, port = tmp_path / "keys", tmp_path / "log", free_port()
    keys.write_text("0123456789abcdef\n")
    trust = ssl.create_default_context(cafile=certificate)
    command = [
        "-m",
        "app.cli",
        "serve",
        "--tier",
        "scripted",
        "--scripted",
        json.dumps(SLOW_STEPS),
        "--port",
        str(port),
    ]
    command += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(private), "--root-path", "/llm"]
    with started(log, *command, "--api-key-file", str(keys)) as process:
        url = f"https://127.0.0.1:{port}"
        wait_ready(process, url, log, trust=trust)
        with httpx.Client(base_url=url, verify=trust) as client:
            for path in ("", "/llm"):
                assert client.get(f"{path}/health").status_code == 200
                assert client.get(f"{path}/v1/models").status_code == 401
                known = client.get(f"{path}/v1/models", headers={"authorization": "Bearer 0123456789abcdef"})
                assert known.json()["data"][0]["id"] == default_model()
            described = client.get("/llm/openapi.json", headers={"x-api-key": "0123456789abcdef"}).json()
            assert described["servers"] == [{"url": "/llm"}]
    assert f"curl {url}/v1/completions" in log.read_text()


def test_a_taken_port_ends_the_start_with_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started(log, "-m", "app.cli", "serve", "--port", str(port)) as process:
            assert process.wait(EXIT_SECONDS) == 2
    assert log.read_text() == (
        f"headwater: cannot listen on 127.0.0.1:{port} (Address already in use): choose another --port or --host\n"
    )


def test_a_model_that_cannot_load_ends_the_start_with_status_2(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = json.dumps({"fail_load": "configuration"})
    command = ["-m", "app.cli", "serve", "--tier", "scripted", "--scripted", script, "--port", str(free_port())]
    with started(log, *command) as process:
        assert process.wait(EXIT_SECONDS) == 2
    assert "Traceback" not in log.read_text()


def test_engines_that_cannot_be_kept_alive_end_the_server_with_status_1(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = json.dumps({"fail_load": "exit"})
    command = ["-m", "app.cli", "serve", "--tier", "scripted", "--scripted", script, "--port", str(free_port())]
    with started(log, *command) as process:
        assert process.wait(60) == 1
    assert "engines died" in log.read_text()


def test_uvicorn_serves_the_application_with_settings_of_the_environment(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    variables = {"HEADWATER_TIER": "scripted", "HEADWATER_SCRIPTED": json.dumps(SLOW_STEPS | {"step_seconds": 0.0})}
    command = ["-m", "uvicorn", "app.main:app", "--port", str(port), "--http", "app.api.protocol:BoundedHttpProtocol"]
    with started(log, *command, **variables) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log)
        answer = httpx.post(f"{url}/v1/completions", json=request(stream=False, max_tokens=5)).json()
        assert answer["usage"]["completion_tokens"] == 5
        os.kill(process.pid, signal.SIGTERM)
        process.wait(EXIT_SECONDS)


def test_check_says_what_would_be_served_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(log, "-m", "app.cli", "check", "--kv-cache-gib", "0.25") as process:
        assert process.wait(60) == 0
    text = log.read_text()
    for label in ("model", "weights", "tier", "exact rows", "KV cache", "room for"):
        assert label in text


async def test_a_grace_serves_new_requests_while_ready_says_draining(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--drain-grace", "60") as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            process.send_signal(signal.SIGTERM)
            while (ready := await client.get("/ready")).status_code == 200:
                pass
            assert ready.json()["state"] == "draining" and "retry-after" in ready.headers
            assert "is ready" not in ready.json()["detail"] and "may finish" in ready.json()["detail"]
            assert (await client.get("/health")).status_code == 200
            answer = await client.post("/v1/completions", json=request(stream=False, max_tokens=2))
            assert answer.json()["usage"]["completion_tokens"] == 2
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
        assert (await asyncio.to_thread(process.wait, EXIT_SECONDS)) == 0
        assert time.monotonic() - began < EXIT_SECONDS  # the second signal cut the minute short


async def first_answer(client: httpx.AsyncClient) -> httpx.Response | None:
    """None while the port is not open yet."""
    try:
        return await client.get("/health")
    except httpx.ConnectError:
        return None


@contextmanager
def silent_hub() -> Iterator[str]:
    """A hub that takes connections and says nothing: a model is looked for without end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_probes_are_answered_while_the_model_is_fetched(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with silent_hub() as hub:
        variables = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HEADWATER_CACHE": str(tmp_path / "cache")}
        command = ["-m", "app.cli", "serve", "someone/some-model", "--port", str(port)]
        with started(log, *command, **variables) as process:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                while (health := await first_answer(client)) is None:
                    assert process.poll() is None, log.read_text()
                    await asyncio.sleep(0.05)
                assert (health.status_code, health.json()) == (200, {"status": "ok"})
                ready = await client.get("/ready")
                assert ready.status_code == 503 and ready.json()["state"] == "starting"
                assert "some-model" in ready.json()["detail"] and int(ready.headers["retry-after"]) >= 1
                for path in ("/v1/chat/completions", "/v1/messages"):
                    refused = await client.post(path, json={})
                    assert refused.status_code == 503 and "starting" in refused.json()["error"]["message"]
            process.send_signal(signal.SIGTERM)
            assert (await asyncio.to_thread(process.wait, EXIT_SECONDS)) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_model_that_cannot_be_found_ends_the_start_with_status_2(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["-m", "app.cli", "serve", "no-such-model", "--port", str(free_port())]
    with started(log, *command) as process:
        assert process.wait(EXIT_SECONDS) == 2
    assert "no-such-model" in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--api-key-file", "/nowhere/keys"), "/nowhere/keys"),
        (("--chat-template", "/nowhere/template"), "/nowhere/template"),
        (("--ssl-certfile", "/nowhere/certificate"), "--ssl-keyfile"),
    ],
)
def test_check_refuses_what_serve_would_refuse(tmp_path: Path, flags: tuple[str, str], named: str) -> None:
    default_model_folder()
    log = tmp_path / "log"
    with started(log, "-m", "app.cli", "check", "--tier", "scripted", *flags) as process:
        assert process.wait(60) == 2
    assert named in log.read_text()


@pytest.mark.parametrize("flag", ["--api-key-file", "--metrics-key-file", "--chat-template"])
def test_files_are_read_before_anybody_can_connect(tmp_path: Path, flag: str) -> None:
    file, log = tmp_path / "file", tmp_path / "log"
    file.write_text("{% if %}")  # neither a template nor a key
    with socket.create_server(("127.0.0.1", 0)) as taken:  # had it listened first, it would say that
        port = str(taken.getsockname()[1])
        with started(log, "-m", "app.cli", "serve", "--offline", "--port", port, flag, str(file)) as process:
            assert process.wait(EXIT_SECONDS) == 2
    assert "listen" not in log.read_text() and ("template" if "template" in flag else str(file)) in log.read_text()
