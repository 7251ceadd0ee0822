"""Installs torch into the environment that runs this script, in the build that suits the machine.

torch is installed first and by range, not from the locks: its builds differ by device, and on Linux the
public package index serves builds with CUDA of several GB. Where an NVIDIA device answers, the plain
build of the user's own pip is right. Elsewhere an index of CPU wheels is tried first, then the user's
own pip, after saying how much will be fetched and why. Standard library only: it runs before the locks.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import threading
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

PROBE_SECONDS = 5.0
LARGE_BYTES = 1_000_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Install torch unless a release in range is already there. Returns pip's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--index", default="", help="index of CPU wheels to try first; empty: none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: ask the driver")
    arguments = parser.parse_args(argv)
    requirement = torch_requirement(Path(__file__).parent.parent / "pyproject.toml")
    if (present := satisfied_by(requirement)) is not None:
        print(f"torch {present} is installed already")
        return 0
    if arguments.device == "cuda":
        return install_plain(requirement, "the build with CUDA was asked for")
    if arguments.device == "auto" and nvidia_device_answers():
        return install_plain(requirement, "an NVIDIA device answers, so this is the build with CUDA")
    return install_cpu(requirement, arguments.index)


def install_cpu(requirement: str, index: str) -> int:
    """Install from the index of CPU wheels, or what the user's own pip offers where that cannot be had."""
    if not index:
        return install_plain(requirement, "no index of CPU wheels is named, so this is what your own pip offers")
    if not answers_in_time(index):
        reason = f"a CPU build would do, but {index} did not answer within {PROBE_SECONDS:.0f} s"
        return install_plain(requirement, reason)
    # What torch needs besides is in the locks, so nothing else comes from that index.
    if pip("install", "--index-url", index, "--retries", "1", "--no-deps", requirement) == 0:
        return 0
    return install_plain(requirement, f"a CPU build would do, but {index} gave none in range")


def torch_requirement(pyproject: Path) -> str:
    """The requirement line of the extra `torch`, so that the range is written once."""
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]["torch"]
    return next(str(line) for line in extras if line.startswith(("torch>", "torch=", "torch<")))


def satisfied_by(requirement: str) -> str | None:
    """The installed torch release where pip would keep it, else None."""
    try:
        present = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    command = ["install", "--dry-run", "--quiet", "--no-deps", "--no-index", requirement]
    return present if pip(*command, quiet=True) == 0 else None


def nvidia_device_answers() -> bool:
    """Whether the driver's own tool lists a device; a card without a driver cannot be used either."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def answers_in_time(index: str) -> bool:
    """Whether the index serves its page of torch. The bound holds for name look-up too, hence the thread."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=PROBE_SECONDS) as page:
                page.read(1)
                answered.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def install_plain(requirement: str, reason: str) -> int:
    """Install what the user's own pip offers; say size and reason first where it is large."""
    num_bytes = download_size(requirement)
    if num_bytes is None:
        print(f"Installing {requirement}: {reason}. The size is unknown; with CUDA it is several GB.", flush=True)
    elif num_bytes > LARGE_BYTES:
        print(f"About to fetch {num_bytes / 1e9:.1f} GB for {requirement}: {reason}.", flush=True)
        print("Ctrl-C stops it. make TORCH_INDEX=URL takes CPU wheels (0.2 GB) from an index you name.", flush=True)
    return pip("install", requirement)


def download_size(requirement: str) -> int | None:
    """Bytes that pip would fetch, or None where the index does not say."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", requirement]
    report = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    if report.returncode != 0:
        return None
    try:
        downloads = json.loads(report.stdout)["install"]
        return sum(size_of(item["download_info"]["url"]) for item in downloads)
    except (KeyError, OSError, ValueError):
        return None


def size_of(url: str) -> int:
    """Bytes of one file by its header; nothing is fetched for a file that lies on this machine."""
    if urllib.parse.urlsplit(url).scheme == "file":
        return 0
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
        return int(answer.headers["Content-Length"])


def pip(*arguments: str, quiet: bool = False) -> int:
    """Run the pip of this interpreter and give its exit code."""
    output = subprocess.DEVNULL if quiet else None
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, stdout=output, stderr=output, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
