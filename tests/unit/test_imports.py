"""What each process loads, seen from outside: imports are checked in a fresh interpreter.

import-linter checks the arrows between our own modules; this checks what is really in sys.modules
afterwards, through every package that we depend on (transformers loads torch, for one).
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Imports every module of the given packages and stops at the first that loads something forbidden.
SCRIPT = """
import importlib, pkgutil, sys
packages, forbidden, skipped = (set(filter(None, part.split(","))) for part in sys.argv[1:])

def check(name):
    importlib.import_module(name)
    loaded = sorted(module for module in forbidden if module in sys.modules)
    assert not loaded, f"{name} loads {loaded}"

def walk(name):
    check(name)
    for module in pkgutil.iter_modules(getattr(sys.modules[name], "__path__", ())):
        full = f"{name}.{module.name}"
        if module.name != "__main__" and full not in skipped:
            walk(full)

for package in sorted(packages):
    walk(package)
print(sum(name == "app" or name.startswith("app.") for name in sys.modules))
"""

HEAVY = "torch,transformers"
SKIPPED = "app.runner.torch,app.training"  # of training, what app.cli imports is checked with it
HTTP = "fastapi,starlette,uvicorn,pydantic"
ENGINE_SIDE = "app.engine,app.scheduler,app.kv,app.runner"
API_SIDE = "app.api,app.client,app.text,app.store,app.main,app.settings"
GRAMMARS_UNUSED = "app.grammar.source,app.grammar.check,app.grammar.constraints"


@pytest.mark.parametrize(
    ("packages", "forbidden"),
    [
        ("app", HEAVY),
        ("app.api,app.client,app.text,app.store", f"{HEAVY},{ENGINE_SIDE}"),
        ("app.engine,app.scheduler,app.kv,app.runner", f"{HEAVY},{API_SIDE},{HTTP},tokenizers,jinja2"),
        ("app.core,app.kv,app.scheduler", f"{HEAVY},numpy,asyncio,app.ipc,app.runner,app.grammar"),
        ("app.grammar", f"{HEAVY},{ENGINE_SIDE},{API_SIDE},{HTTP},tokenizers"),
        # Both processes import these; the library comes with the first grammar.
        (GRAMMARS_UNUSED, "llguidance,numpy,app.grammar.compiler,app.grammar.matching"),
        # The engine is started before FastAPI is imported: that costs a good part of the start.
        ("app.client,app.ipc,app.core", f"{HEAVY},{HTTP},numpy"),
    ],
    ids=[
        "everything-but-torch-tiers",
        "api-process",
        "engine-process",
        "pure-decisions",
        "grammars",
        "no-grammar",
        "client",
    ],
)
def test_importing_loads_nothing_forbidden(packages: str, forbidden: str) -> None:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, packages, forbidden, SKIPPED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= len(packages.split(","))


def test_the_check_sees_what_it_forbids() -> None:
    """The script itself: a package that loads a forbidden module is named."""
    command = [sys.executable, "-c", SCRIPT, "app.core", "msgspec", ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "loads ['msgspec']" in done.stderr
