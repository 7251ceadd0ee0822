"""Which folder of weights the settings mean: what `serve`, `check` and `uvicorn app.main:app` share."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.console import remark
from app.core.config import EngineConfig
from app.runner.choose import has_nvidia_device
from app.runner.memory import available_memory
from app.settings import Settings
from app.store import GgufForm, ModelFolder, resolve

_SHARE = 0.8
"""Of the free memory, that weights in bfloat16 may take: the KV cache needs room too."""
_OF_THE_API = frozenset(
    {"chat_template.jinja", "chat_template.json", "generation_config.json", "tokenizer_config.json"}
)
"""Files of a model that no engine reads; what the engine is told of them is in its config."""


@dataclass(frozen=True, slots=True)
class Model:
    """What an engine loads."""

    folder: ModelFolder
    config: EngineConfig
    files: frozenset[tuple[str, int, int, int, int]]
    """Of each file that the engine reads: name, inode, size, and the times of its contents and of its inode."""


def find_model(settings: Settings, *, report: Callable[[str], None] = remark, held_bytes: int = 0) -> ModelFolder:
    """Find or make the model's folder.

    A .gguf is served in bfloat16 unless int4 is asked, or nothing is asked and bfloat16 does not fit. `held_bytes`: of
    memory, by weights whose place it takes.
    Raises ConfigurationError.
    """
    return resolve(
        settings.model, is_offline=settings.offline, gguf_form=_gguf_form(settings, held_bytes), report=report
    )


def _gguf_form(settings: Settings, held_bytes: int) -> GgufForm:
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not has_nvidia_device())
    may_choose = settings.quantization is None and settings.dtype == "auto" and settings.tier in ("auto", "native")
    return GgufForm(
        as_it_is=settings.quantization == "int4",
        memory_bytes=int((available_memory() + held_bytes) * _SHARE) if on_cpu and may_choose else None,
    )


def read_model(settings: Settings, folder: ModelFolder) -> Model:
    """What an engine would load now."""
    config = settings.to_engine_config(str(folder.path), folder.eos_token_ids)
    return Model(folder, config, _files_of(folder.path))


def _files_of(path: Path) -> frozenset[tuple[str, int, int, int, int]]:
    with os.scandir(path) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file() and entry.name not in _OF_THE_API]
    return frozenset((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)
