"""Weights in blocks of 32 with a scale each: their kinds, their sizes, and a folder that holds a GGUF file.

Such a folder has model.gguf and an index that says where each tensor lies, in which kind, under the name
that transformers gives it (`app.store.gguf_blocks` writes it and knows what GGUF files are).
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ConfigurationError
from app.runner.native.safetensors import BROKEN, DTYPES, Tensor, as_float

INDEX = "model.gguf.index.json"
BLOCK = 32
_UNIT = 32


class SourceType(IntEnum):
    """A kind of block in a file; the value is GGUF's number."""

    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8

    @property
    def num_bytes(self) -> int:
        """Of 32 weights."""
        return {SourceType.Q4_0: 18, SourceType.Q4_1: 20, SourceType.Q8_0: 34}[self]


class BlockKind(IntEnum):
    """How a packed linear holds its blocks: the values of src/blocks.h."""

    BITS_4 = 1
    BITS_4_MIN = 2
    """With a minimum beside the scale."""
    BITS_8 = 3
    BITS_8_MIN = 4

    @property
    def column_bytes(self) -> int:
        """Of 32 weights of one column."""
        return {1: 18, 2: 20, 3: 34, 4: 36}[self]


def kind_of(types: Iterable[SourceType]) -> BlockKind:
    """The smallest kind that holds every one of `types` as it is: what lies side by side has one kind."""
    here = set(types)
    if SourceType.Q8_0 in here:
        return BlockKind.BITS_8 if len(here) == 1 else BlockKind.BITS_8_MIN
    return BlockKind.BITS_4_MIN if SourceType.Q4_1 in here else BlockKind.BITS_4


def packed_bytes(kind: BlockKind, n_pad: int, k: int) -> int:
    """Of a linear of `n_pad` columns, `k` filled up to whole blocks."""
    return n_pad * -(-k // BLOCK) * kind.column_bytes


def is_in_blocks(model_dir: Path) -> bool:
    """Whether the folder holds a GGUF file to be served as it is."""
    return (model_dir / INDEX).is_file()


def read_blocks(model_dir: Path) -> dict[str, Tensor]:
    """All tensors of the folder by name. Raises ConfigurationError where a file is missing or broken."""
    path = model_dir / INDEX
    mappings: dict[str, mmap.mmap] = {}
    try:
        entries: Mapping[str, Any] = json.loads(path.read_text())["tensors"]
        for name in {str(entry["file"]) for entry in entries.values()}:
            with (model_dir / name).open("rb") as file:
                mappings[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {name: _tensor(entry, mappings[entry["file"]]) for name, entry in entries.items()}
    except BROKEN as error:
        raise ConfigurationError(
            f"{path} does not fit the files beside it ({type(error).__name__}: {error}); fetch the model again"
        ) from error


def _tensor(entry: Mapping[str, Any], mapping: mmap.mmap) -> Tensor:
    kind, shape, offset = str(entry["kind"]), tuple(entry["shape"]), int(entry["offset"])
    heads = int(entry["permuted_heads"])
    if kind in SourceType.__members__:
        rows, columns = shape
        row_bytes = -(-columns // BLOCK) * SourceType[kind].num_bytes
        flat = np.frombuffer(mapping, dtype=np.uint8, count=rows * row_bytes, offset=offset)
        return Tensor(kind, flat.reshape(rows, row_bytes), num_columns=columns, permuted_heads=heads)
    dtype = DTYPES[kind]
    (size,) = shape
    values = np.frombuffer(mapping, dtype=dtype, count=size, offset=offset)
    if heads:
        reordered = np.empty_like(values)
        reordered[unpermuted_rows(size, heads)] = values
        values = reordered
    if added := float(entry.get("added", 0.0)):
        return Tensor("F32", as_float(Tensor(kind, values)) - np.float32(added))
    return Tensor(kind, values)


def unpermuted_rows(num_rows: int, heads: int) -> NDArray[np.int32]:
    """Where transformers has each row of a file: llama.cpp keeps the two halves of a head's rows in turns."""
    rows = np.arange(num_rows, dtype=np.int32)
    if not heads:
        return rows
    size = num_rows // heads
    within = rows % size
    return rows - within + within % 2 * (size // 2) + within // 2
