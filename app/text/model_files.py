"""Reads the small JSON files of a canonical model folder that say which tokens are special.

Nothing here runs code of the folder; a file that is absent is an empty answer, one that does not
parse is a `ConfigurationError` that names it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from app.core.errors import ConfigurationError


def read_json_object(path: Path) -> dict[str, object]:
    """The object in `path`; empty where the file does not exist."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}; fetch the model again") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} holds a {type(value).__name__}, not an object; fetch the model again")
    return value


def read_special_tokens(model_dir: Path) -> dict[str, str]:
    """Role → content, as in {"bos_token": "<s>"}: tokenizer_config.json first, then special_tokens_map.json."""
    tokens = _special_tokens(read_json_object(model_dir / "special_tokens_map.json"))
    return tokens | _special_tokens(read_json_object(model_dir / "tokenizer_config.json"))


def _special_tokens(fields: Mapping[str, object]) -> dict[str, str]:
    tokens = {}
    for name, value in fields.items():
        # A token is written as a string or as a serialised AddedToken.
        content = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
