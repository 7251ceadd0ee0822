"""Whose keys open the server: what `serve`, `check` and `uvicorn app.main:app` share. Imports nothing of HTTP."""

import os
from pathlib import Path

from app.api.key_ring import KeyRing
from app.settings import API_KEY_VARIABLE, Settings


def make_keys(settings: Settings) -> KeyRing | None:
    """The API keys of file and environment; None where neither is given. Raises ConfigurationError."""
    file = None if settings.api_key_file is None else Path(settings.api_key_file)
    key = os.environ.get(API_KEY_VARIABLE)
    if file is None and key is None:
        return None
    return KeyRing(file=file, keys=() if key is None else (key,))


def make_metrics_keys(settings: Settings) -> KeyRing | None:
    """Keys for /metrics alone. A null device, which compose mounts where there is no file, is none."""
    file = None if settings.metrics_key_file is None else Path(settings.metrics_key_file)
    return None if file is None or file.is_char_device() else KeyRing(file=file)
