"""The first line of `make serve`: an environment that was left half made is made again."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_an_environment_without_pip_is_made_again(tmp_path: Path) -> None:
    """What Debian's `python3 -m venv` leaves behind when the package python3-venv is missing."""
    make = shutil.which("make")
    if make is None or importlib.util.find_spec("ensurepip") is None:
        pytest.skip("needs make and ensurepip (Debian's python3-venv)")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "pip.txt").touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)

    command = [make, ".venv/.created", f"PYTHON={sys.executable}", "VENV=.venv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    python = tmp_path / ".venv" / "bin" / "python"
    assert subprocess.run([python, "-m", "pip", "--version"], check=False).returncode == 0


def test_a_second_start_installs_nothing(tmp_path: Path) -> None:
    """Until what was installed changes: then only what depends on it is installed again."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    sources = ["Makefile", "pyproject.toml", "setup.py", "scripts/install_torch.py"]
    sources += [f"requirements/{name}.txt" for name in ("pip", "torch", "dev")]
    for age, name in enumerate([*sources, *(f".venv/.{name}" for name in ("created", "torch", "installed"))]):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((ROOT / name).read_bytes() if (ROOT / name).is_file() and name in sources else b"")
        os.utime(file, (1_000_000_000 + age, 1_000_000_000 + age))

    # As from a shell: below `make test` it would take that one's flags, and say where it goes.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def commands() -> list[str]:
        command = [make, "--dry-run", "serve", "VENV=.venv"]
        return subprocess.run(
            command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert [line.split() for line in commands()] == [[".venv/bin/headwater", "serve"]]
    (tmp_path / "requirements" / "torch.txt").touch()
    again = commands()
    assert any("requirements/torch.txt" in line for line in again) and not any(
        "install_torch" in line for line in again
    )


def test_ci_installs_what_makes_environments() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python3 -c 'import ensurepip'" in text and "packages+=(python3-venv)" in text
