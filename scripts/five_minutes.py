"""Follows README as a newcomer would, with an empty HOME in an empty folder, and prints how long each step took.

    python scripts/five_minutes.py [--source URL-OR-FOLDER] [--own-model MODEL]

Clone, `make serve`, first token (README's curl), first page, first own client (README's Python, in an environment of
its own), own model (`headwater check`, by default on a copy of the fetched model's folder). Needs git, make, curl and
Python only. Everything lies in a temporary folder that is removed; every process is ended.
"""

import argparse
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urljoin

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
README_URL = "http://127.0.0.1:8000"
BLOCK = re.compile(r"<!-- tested -->\n```(\w+)\n(.*?)```", re.DOTALL)
LINKED = re.compile(r'(?:src|href)="([^"#:]+)"')
IMPORTED = re.compile(r'from "(\./[^"]+)"')
KEPT_VARIABLES = re.compile(r"PATH|LANG|LC_\w+|TMPDIR|PIP_\w+|\w*_proxy|\w*_PROXY|SSL_CERT_\w+|REQUESTS_CA_BUNDLE")
"""What a fresh login on the same machine would have: where programs, the network and the package index are."""
START_SECONDS = 1800
STOP_SECONDS = 60


class Newcomer:
    """A person with an empty HOME. `step` runs something and notes how long it took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        kept = {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}
        self.environment = {**kept, "HOME": str(self.home)}
        self.steps: list[tuple[str, float]] = []

    def step(self, name: str, work: Callable[[], T]) -> T:
        """Run `work` and note its seconds."""
        print(f"... {name}", flush=True)
        start = time.monotonic()
        result = work()
        self.steps.append((name, time.monotonic() - start))
        return result

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Standard output of a command, which must succeed."""
        done = subprocess.run(
            command, cwd=self.folder if cwd is None else cwd, env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


@contextmanager
def make_serve(newcomer: Newcomer, checkout: Path, port: int) -> Iterator[Callable[[], None]]:
    """`make serve` in its own session, ended at the end. Gives a function that waits until it is ready."""
    log = newcomer.folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["make", "serve", f"ARGS=--port {port}"],
            cwd=checkout,
            env=newcomer.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def wait_ready() -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(f"http://127.0.0.1:{port}/ready"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"make serve did not get ready:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)

    try:
        yield wait_ready
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def follow_readme(newcomer: Newcomer, *, source: str, own_model: str | None) -> None:
    """All steps, one after another."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    checkout = newcomer.folder / "headwater"
    newcomer.step("clone", lambda: newcomer.run("git", "clone", "--quiet", source, str(checkout)))
    readme = (checkout / "README.md").read_text(encoding="utf-8").replace(README_URL, url)
    curl, python = (next(text for kind, text in BLOCK.findall(readme) if kind == wanted) for wanted in ("sh", "python"))
    with make_serve(newcomer, checkout, port) as wait_ready:
        newcomer.step("make serve: install, fetch the model, load it", wait_ready)
        newcomer.step("first token: README's curl", lambda: first_token(newcomer, curl))
        newcomer.step("first page: / and all its files", lambda: fetch_page(url))
        newcomer.step("first own client: README's Python, openai installed", lambda: own_client(newcomer, python))
    model = copy_of_default(newcomer) if own_model is None else own_model
    headwater = str(checkout / ".venv" / "bin" / "headwater")
    answer = newcomer.step("own model: headwater check FOLDER", lambda: newcomer.run(headwater, "check", model))
    print(answer.rstrip())


def first_token(newcomer: Newcomer, block: str) -> None:
    """Run the block until its first event with data; closing the pipe ends it."""
    with subprocess.Popen(
        ["bash", "-euc", block], env=newcomer.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if not any(line.startswith(b"data: {") for line in process.stdout):
            raise SystemExit("README's curl gave no token")


def fetch_page(url: str) -> None:
    """The page at /, what it links to, and the modules that these import, as a browser does."""
    wanted = [urljoin(f"{url}/", name) for name in LINKED.findall(_fetch(f"{url}/").decode())]
    if not wanted:
        raise SystemExit("the page links no file")
    fetched: set[str] = set()
    while wanted:
        address = wanted.pop()
        if address not in fetched:
            fetched.add(address)
            wanted += [urljoin(address, name) for name in IMPORTED.findall(_fetch(address).decode())]


def own_client(newcomer: Newcomer, block: str) -> None:
    """A fresh environment with the openai package runs README's example."""
    folder = newcomer.folder / "client"
    newcomer.run(sys.executable, "-m", "venv", str(folder))
    newcomer.run(str(folder / "bin" / "pip"), "install", "--quiet", "openai")
    if not newcomer.run(str(folder / "bin" / "python"), "-c", block).strip():
        raise SystemExit("README's Python example printed nothing")


def copy_of_default(newcomer: Newcomer) -> str:
    """A folder with a model outside of the cache, as one's own would be."""
    fetched = [path.parent for path in newcomer.home.glob(".cache/headwater/models/*/config.json")]
    if len(fetched) != 1:
        raise SystemExit(f"expected one fetched model, found {fetched}")
    folder = newcomer.folder / "own-model"
    shutil.copytree(fetched[0], folder, ignore=shutil.ignore_patterns("headwater.json"))
    return str(folder)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        return bool(_fetch(url))
    except OSError:  # refused, or a 503: urllib's HTTPError is one
        return False


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        body: bytes = answer.read()
    return body


def main() -> None:
    """Follow README and print the table."""
    parser = argparse.ArgumentParser(description="Time a newcomer's way through README.")
    parser.add_argument("--source", default=str(ROOT), help="what to clone [this checkout's last commit]")
    parser.add_argument("--own-model", help="model for `headwater check` [a copy of the default model's folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="five-minutes-") as name:
        newcomer = Newcomer(Path(name))
        follow_readme(newcomer, source=options.source, own_model=options.own_model)
        print_table(newcomer.steps)


def print_table(steps: list[tuple[str, float]]) -> None:
    """Seconds of each step, and the time since the start. Before the folder is removed, which takes a while."""
    print(f"\n{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}\n")
    print("| step | seconds | since the start, min:s |\n|---|---|---|")
    total = 0.0
    for step, seconds in steps:
        total += seconds
        print(f"| {step} | {seconds:.1f} | {int(total // 60)}:{int(total % 60):02d} |")


if __name__ == "__main__":
    main()
