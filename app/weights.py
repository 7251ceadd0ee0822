"""Which folder of weights the settings mean: what `serve`, `check` and `uvicorn app.main:app` share."""

from collections.abc import Callable

from app.console import remark
from app.runner.choose import has_nvidia_device
from app.runner.memory import available_memory
from app.settings import Settings
from app.store import GgufForm, ModelFolder, resolve

_SHARE = 0.8
"""Of the free memory, that weights in bfloat16 may take: the KV cache needs room too."""


def find_model(settings: Settings, *, report: Callable[[str], None] = remark) -> ModelFolder:
    """Find or make the model's folder.

    A .gguf is served in bfloat16 unless int4 is asked, or nothing is asked and bfloat16 does not fit.
    Raises ConfigurationError.
    """
    return resolve(settings.model, is_offline=settings.offline, gguf_form=_gguf_form(settings), report=report)


def _gguf_form(settings: Settings) -> GgufForm:
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not has_nvidia_device())
    may_choose = settings.quantization is None and settings.dtype == "auto" and settings.tier in ("auto", "native")
    return GgufForm(
        as_it_is=settings.quantization == "int4",
        memory_bytes=int(available_memory() * _SHARE) if on_cpu and may_choose else None,
    )
