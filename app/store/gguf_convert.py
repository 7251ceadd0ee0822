"""A .gguf file into a canonical folder, by gguf, tokenizers and numpy alone. Runs nothing of the file.

Two forms: in bfloat16 (model.safetensors), or as it is (model.gguf and an index of its tensors).
"""

import json
from pathlib import Path

from app.store.cache import Report
from app.store.gguf_blocks import write_block_index
from app.store.gguf_config import GgufModel, config_json, generation_config_json, read_model
from app.store.gguf_file import read_gguf
from app.store.gguf_tokenizer import tokenizer_files
from app.store.gguf_weights import write_weights

CONVERTER_EPOCH = 1
"""Raised when the same .gguf would give another folder: cached conversions of an older epoch are made anew."""


def convert_gguf(source: Path, target: Path) -> dict[str, str]:
    """Write the files of `source` into the existing folder `target`, its weights in bfloat16.

    Returns:
        sha256 by file name, for those that were hashed while they were written.

    Raises:
        ConfigurationError: the file is damaged or holds something that is not supported.
    """
    model = _write_texts(source, target)
    return {"model.safetensors": write_weights(model, target / "model.safetensors")}


def index_gguf(source: Path, target: Path, *, report: Report) -> dict[str, str]:
    """The same without weights but with an index of them: model.gguf itself is the caller's to put there."""
    return write_block_index(_write_texts(source, target), target, report=report)


def _write_texts(source: Path, target: Path) -> GgufModel:
    model = read_model(read_gguf(source))
    texts = tokenizer_files(model.file, vocab_size=model.vocab_size)
    texts["config.json"] = json.dumps(config_json(model), indent=2) + "\n"
    texts["generation_config.json"] = json.dumps(generation_config_json(model), indent=2) + "\n"
    for name, text in texts.items():
        (target / name).write_bytes(text.encode())
    return model
