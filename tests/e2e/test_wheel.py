"""The wheel alone: built from a copy, installed with the locks in an empty environment, it serves.

Nothing of the checkout is in reach of the server: it runs in another folder with another interpreter's
environment, without torch, on the tier of C kernels, with the default model of the user's cache.
"""

import email
import json
import os
import signal
import socket
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.runner.base import TierUnavailable
from app.runner.native.levels import choose_level
from tests.store_models import default_model_folder

ROOT = Path(__file__).parents[2]
SOURCES = ("app", "models", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")

# Building, installing and serving: each test waits for what the first one set up.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout's files, with kernels where this machine can run them."""
    copy = tmp_path_factory.mktemp("copy")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SOURCES]
    for name in run(*listing, cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    if has_native_tier():
        run(sys.executable, "-c", "from app.runner.native import build; build.main()", cwd=copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", ".", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with what base.txt names and the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    run(*pip, "--require-hashes", "--requirement", str(ROOT / "requirements" / "base.txt"), cwd=folder)
    run(*pip, str(wheel), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def server(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`headwater serve`, ready, and its address."""
    if not has_native_tier():
        pytest.skip("the base install has no tier for this machine")
    default_model_folder()  # fetched here if need be, by a pip; the environment has none
    port = free_port()
    command = [str(environment / "bin" / "headwater"), "serve", "--port", str(port), "--kv-cache-gib", "0.25"]
    folder = tmp_path_factory.mktemp("elsewhere")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=clean_environment(), text=True, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(process, url, folder / "log")
        yield process, url
    finally:
        process.kill()
        process.wait()


def test_wheel_holds_what_serves_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(n for n in names if n.endswith("/METADATA"))))
    assert {name.split("/")[0] for name in names} == {"app", f"headwater-{metadata['Version']}.dist-info"}
    assert {"app/py.typed", "app/cli.py", "app/store/models/catalog.toml"} <= set(names)
    page = {name.rsplit("/", 1)[1] for name in names if "/api/web/" in name}
    assert page == {path.name for path in (ROOT / "app" / "api" / "web").iterdir()}
    sources = {path.name for path in (ROOT / "app" / "runner" / "native" / "src").iterdir()}
    assert sources == {name.rsplit("/", 1)[1] for name in names if "/native/src/" in name}
    kernels = [name for name in names if name.endswith(".so")]
    assert bool(kernels) == has_native_tier() == (not wheel.name.endswith("-py3-none-any.whl"))
    assert not [name for name in names if "__pycache__" in name]


def test_torch_comes_with_its_extra_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA")))
    needs = email.message_from_bytes(content).get_all("Requires-Dist") or []
    torch = [line for line in needs if line.startswith(("torch", "transformers"))]
    assert torch and all('extra == "torch"' in line for line in torch)


def test_installed_wheel_streams_and_ends(server: tuple[subprocess.Popen[str], str], environment: Path) -> None:
    process, url = server
    request = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
    with httpx.Client(base_url=url, timeout=60) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        request["model"] = model
        whole = client.post("/v1/completions", json=request).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json={**request, "stream": True}) as stream:
            events = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
    assert "Paris" in whole

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert processes_of(environment) == []


def has_native_tier() -> bool:
    """Whether this machine runs the kernels that a wheel may bring."""
    try:
        choose_level()
    except TierUnavailable:
        return False
    return True


def run(*command: str, cwd: Path) -> str:
    """Run to the end; what it said is in the failure."""
    done = subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[:4]}: {done.stderr[-3000:]}"
    return done.stdout


def clean_environment() -> dict[str, str]:
    """The user's environment less what could lead back to the checkout or change the defaults."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("HEADWATER_", "PYTHON", "VIRTUAL"))
    }


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(process: subprocess.Popen[str], url: str, log: Path) -> None:
    """Wait for /ready; the log is in the failure."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"not ready: {log.read_text()[-3000:]}")


def processes_of(environment: Path) -> list[str]:
    """Command lines of live processes that run the environment's interpreter."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(environment) in line:
            found.append(line)
    return found
