"""Which build of torch is installed where: the script runs in an empty environment with a pip that takes notes."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import install_torch

ROOT = Path(__file__).parents[2]

# Stands in for pip in the environment under test: writes down its arguments. A dry run answers with PIP_REPORT;
# without an index it says whether the release that is there would be kept.
PIP = """
import json, os, sys
arguments = sys.argv[1:]
if "--no-index" in arguments:
    import importlib.metadata
    sys.exit(importlib.metadata.version("torch") == "2.10.0")
if "--dry-run" in arguments:
    if "--report" not in arguments or not os.environ.get("PIP_REPORT"):
        sys.exit(1)
    print(os.environ["PIP_REPORT"])
    sys.exit(0)
with open(os.environ["PIP_NOTES"], "a") as notes:
    notes.write(json.dumps(arguments) + "\\n")
sys.exit(1 if "--index-url" in arguments and os.environ.get("INDEX_FAILS") else 0)
"""


class Index(http.server.BaseHTTPRequestHandler):
    """A page of torch, and one large file that is only asked for its size."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2500000000")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "pip.py").write_text(PIP, encoding="utf-8")
    return folder / "bin" / "python"


class Machine:
    """One run of the script on a machine with or without an NVIDIA device."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python = python
        self.folder = folder
        self.environment = {"PATH": str(folder), "PIP_NOTES": str(folder / "notes"), "no_proxy": "*"}

    def add_nvidia_device(self) -> None:
        tool = self.folder / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n", encoding="utf-8")
        tool.chmod(0o755)

    def add_torch(self, version: str) -> None:
        metadata = self.folder / "site" / f"torch-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n", encoding="utf-8")
        self.environment["PYTHONPATH"] = str(self.folder / "site")

    def install(self, *arguments: str) -> tuple[list[list[str]], str]:
        """Run the script. Returns what pip was asked to install and what the user read."""
        command = [str(self.python), str(ROOT / "scripts" / "install_torch.py"), *arguments]
        environment = {**self.environment, "PATH": self.environment["PATH"] + os.pathsep + os.defpath}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        notes = Path(self.environment["PIP_NOTES"])
        lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
        return [json.loads(line) for line in lines], done.stdout


@pytest.fixture
def machine(python: Path, tmp_path: Path) -> Machine:
    return Machine(python, tmp_path)


REQUIREMENT = install_torch.torch_requirement(ROOT / "pyproject.toml")


def test_the_range_is_read_from_the_project() -> None:
    assert REQUIREMENT == "torch>=2.11,<=2.13.0"


def test_cpu_wheels_come_first_without_a_device(machine: Machine, index: str) -> None:
    calls, _ = machine.install("--index", f"{index}/cpu")
    assert calls == [["install", "--index-url", f"{index}/cpu", "--retries", "1", "--no-deps", REQUIREMENT]]


def test_plain_build_with_a_device(machine: Machine, index: str) -> None:
    machine.add_nvidia_device()
    machine.environment["PIP_REPORT"] = report(index)
    calls, said = machine.install("--index", f"{index}/cpu")
    assert calls == [["install", REQUIREMENT]]
    assert "5.0 GB" in said and "NVIDIA device answers" in said


def test_own_pip_where_the_index_fails(machine: Machine, index: str) -> None:
    machine.environment["INDEX_FAILS"] = "1"
    calls, said = machine.install("--index", f"{index}/cpu")
    assert [call[-1] for call in calls] == [REQUIREMENT, REQUIREMENT]
    assert calls[-1] == ["install", REQUIREMENT]
    assert "size is unknown" in said


def test_own_pip_where_the_index_has_no_torch(machine: Machine, index: str) -> None:
    machine.environment["PIP_REPORT"] = report(index)
    calls, said = machine.install("--index", f"{index}/other")
    assert calls == [["install", REQUIREMENT]]
    assert "About to fetch 5.0 GB" in said and "did not answer" in said


def test_own_pip_where_no_index_is_named(machine: Machine) -> None:
    calls, _ = machine.install("--index", "")
    assert calls == [["install", REQUIREMENT]]


def test_cuda_is_taken_where_it_is_asked_for(machine: Machine, index: str) -> None:
    calls, _ = machine.install("--device", "cuda", "--index", f"{index}/cpu")
    assert calls == [["install", REQUIREMENT]]


def test_cpu_is_taken_where_it_is_asked_for(machine: Machine, index: str) -> None:
    machine.add_nvidia_device()
    calls, _ = machine.install("--device", "cpu", "--index", f"{index}/cpu")
    assert calls[0][1] == "--index-url"


def test_files_on_this_machine_are_no_download(machine: Machine) -> None:
    machine.environment["PIP_REPORT"] = json.dumps({"install": [{"download_info": {"url": "file:///torch.whl"}}]})
    calls, said = machine.install()
    assert calls == [["install", REQUIREMENT]]
    assert said == ""


def test_an_index_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_torch, "PROBE_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not install_torch.answers_in_time(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_nothing_is_installed_over_a_release_in_range(machine: Machine) -> None:
    machine.add_torch("2.12.0")
    calls, said = machine.install()
    assert calls == []
    assert "torch 2.12.0 is installed already" in said


def test_a_release_out_of_range_is_replaced(machine: Machine) -> None:
    machine.add_torch("2.10.0")
    calls, _ = machine.install()
    assert calls == [["install", REQUIREMENT]]


def report(index: str) -> str:
    """What pip's dry run would print for two files of 2.5 GB."""
    items = [{"download_info": {"url": f"{index}/{name}.whl"}} for name in ("torch", "nvidia")]
    return json.dumps({"install": items})
