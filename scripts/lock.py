"""Writes the hashed locks in requirements/ from pyproject.toml, with pip-compile.

Each lock is complete in itself and is installed with `--no-deps`, so nothing that a package asks for can
bring torch in again from an index. dev.txt is solved first and constrains the others: one release of each
package in all of them. torch and the packages of its CUDA build are left out (scripts/install_torch.py
installs them by range); no index address is written. Run on the oldest Python that is supported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Lock and source, with the extras that are read from it.
LOCKS = {
    "dev": ("pyproject.toml", ("torch", "otel", "dev")),
    "torch": ("pyproject.toml", ("torch",)),
    "base": ("pyproject.toml", ()),
    "pip": ("requirements/pip.in", ()),
}
# Never written to a lock: torch itself and what only its builds for a device need.
NOT_LOCKED = re.compile(r"(torch|triton|pytorch-triton.*|cuda-.*|nvidia-.*)==")


def main() -> int:
    """Compile every lock. Returns the exit code of the first that fails, else 0."""
    if sys.version_info[:2] != (3, 11):
        print("The locks are made on Python 3.11, the oldest that is supported.", file=sys.stderr)
        return 2
    upgrade = sys.argv[1:]
    for name, (source, extras) in LOCKS.items():
        target = ROOT / "requirements" / f"{name}.txt"
        command = [sys.executable, "-m", "piptools", "compile", "--quiet", *flags(), *upgrade]
        command += [f"--extra={extra}" for extra in extras]
        if name != "dev":
            command += ["--constraint=requirements/dev.txt"]
        command += [f"--output-file={target.relative_to(ROOT)}", source]
        environment = os.environ | {"CUSTOM_COMPILE_COMMAND": "make lock"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code != 0:
            return code
        target.write_text(without_torch(target.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {target.relative_to(ROOT)}")
    return 0


def flags() -> list[str]:
    """What all locks have in common: hashes of every platform's files, no addresses, setuptools pinned too."""
    return [
        "--generate-hashes",
        "--allow-unsafe",
        "--strip-extras",
        "--no-emit-index-url",
        "--no-emit-find-links",
        "--no-emit-trusted-host",
        "--annotation-style=line",
        "--resolver=backtracking",
    ]


def without_torch(lock: str) -> str:
    """The lock less the entries of NOT_LOCKED. An entry is a line and the indented lines that follow it."""
    kept: list[str] = []
    dropping = False
    for line in lock.splitlines(keepends=True):
        if not line.startswith((" ", "\t")):
            dropping = NOT_LOCKED.match(line) is not None
        if not dropping:
            kept.append(line)
    return "".join(kept)


if __name__ == "__main__":
    raise SystemExit(main())
