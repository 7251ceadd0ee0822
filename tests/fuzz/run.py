"""`make fuzz`: schemathesis against a server of its own, until enough cases are answered.

Every round is one `st run` with another seed: all phases, valid and invalid requests (tests/fuzz/schemathesis.toml),
judged by tests/fuzz/hooks.py. Prints what docs/reference/conformance.md quotes. The exit code is 0 where no round
failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.serving import free_port, serve_default_model, started, wait_ready

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
ALL_PHASES = "examples,coverage,fuzzing,stateful"
_SCRIPTED = {"vocab_size": 4096, "max_model_len": 512, "eos_after": 8}
"""Of the tokenizer of models/rill-stories-3m, and short answers."""
_REAL_MAX_TOKENS = 16


@dataclass
class Counts:
    """Cases of all rounds so far."""

    cases: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path) -> None:
        """Add what one round left in `path`."""
        for name, counts in json.loads(path.read_text(encoding="utf-8")).items():
            getattr(self, name).update(counts)


@contextmanager
def scripted_server(log: Path, *flags: str, **script: int) -> Iterator[str]:
    """The address of a server with the scripted tier, a template that reads tools, and short answers."""
    port = free_port()
    arguments = ["-m", "app.cli", "serve", str(ROOT / "models" / "rill-stories-3m"), "--tier", "scripted"]
    arguments += ["--scripted", json.dumps(_SCRIPTED | script), "--chat-template", str(FOLDER / "template.jinja")]
    with started(log, *arguments, "--port", str(port), "--log-format", "json", *flags) as process:
        wait_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def real_server(log: Path) -> Iterator[str]:
    """The address of a server with the default model and a short context."""
    with serve_default_model(log, "--max-model-len", "512", "--log-format", "json") as (_, url):
        yield url


def fuzz(
    url: str, counts: Counts, *, seed: int, max_examples: int, phases: str = ALL_PHASES, max_tokens: int | None = None
) -> subprocess.CompletedProcess[str]:
    """One round of at most `max_examples` generated cases an operation; adds to `counts`."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "counts.json"
        variables = {"SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "FUZZ_COUNTS": str(target), "PYTHONPATH": str(ROOT)}
        if max_tokens is not None:
            variables["FUZZ_MAX_TOKENS"] = str(max_tokens)
        command = [str(Path(sys.executable).with_name("st")), "--config-file", str(FOLDER / "schemathesis.toml"), "run"]
        command += [f"{url}/openapi.json", "--phases", phases, "--seed", str(seed), "--max-examples", str(max_examples)]
        done = subprocess.run(
            command, cwd=scratch, env=os.environ | variables, capture_output=True, text=True, check=False
        )
        counts.add(target)
    return done


def main() -> int:
    """Run rounds until `--cases` are answered; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make fuzz", description="Fuzz every endpoint of a server of its own.")
    parser.add_argument("--cases", type=int, default=10_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--real", action="store_true", help="the default model in place of the scripted tier")
    options = parser.parse_args()
    counts, failures, seed = Counts(), 0, options.seed
    serving = real_server if options.real else scripted_server
    max_tokens = _REAL_MAX_TOKENS if options.real else None
    phases = "examples,fuzzing,stateful" if options.real else ALL_PHASES
    max_examples = 40 if options.real else 200
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch) / "server.log") as url:
        while counts.cases.total() < options.cases:
            done = fuzz(url, counts, seed=seed, max_examples=max_examples, phases=phases, max_tokens=max_tokens)
            failures += done.returncode != 0
            if done.returncode != 0:
                print(done.stdout)
            print(f"seed {seed}: {counts.cases.total()} cases so far, {failures} rounds failed", flush=True)
            seed += 1
    for title, counter in vars(counts).items():
        print(f"\n{title}:")
        print("\n".join(f"  {count:6} {name}" for name, count in sorted(counter.items())))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
