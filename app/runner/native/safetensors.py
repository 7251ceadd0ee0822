"""Read-only views of the tensors in a model folder's safetensors files, without torch.

The library's numpy reader refuses bfloat16, so the header is parsed here and the file is mapped. Views
hold the mapping; it goes when they do.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ConfigurationError

_MAX_HEADER = 100_000_000
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}

BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error)
"""What reading raises where a file does not have the form that it should."""


@dataclass(frozen=True)
class Tensor:
    """One tensor where it lies in its file."""

    kind: str
    """BF16 (as uint16), F16, F32, or a kind of blocks (bytes)."""
    values: NDArray[Any]
    num_columns: int | None = None
    """Elements of a row, where `values` are blocks: (rows, bytes of a row)."""
    permuted_heads: int = 0
    """Heads whose rows lie in turns, where `values` are blocks; 0: rows lie as they should."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""
        return self.values.shape if self.num_columns is None else (len(self.values), self.num_columns)


def read_tensors(model_dir: Path) -> dict[str, Tensor]:
    """All tensors of the folder by name. Raises ConfigurationError where a file is missing or broken."""
    tensors: dict[str, Tensor] = {}
    for path in _files(model_dir):
        try:
            tensors.update(_read_file(path))
        except BROKEN as error:
            raise ConfigurationError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error
    return tensors


def as_float(tensor: Tensor) -> NDArray[np.float32]:
    """A float tensor's values in float32."""
    if tensor.kind == "BF16":
        return (tensor.values.astype(np.uint32) << 16).view(np.float32)
    return tensor.values.astype(np.float32)


def _files(model_dir: Path) -> list[Path]:
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            return [model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except BROKEN as error:
            raise ConfigurationError(
                f"{index} is no readable index of safetensors files ({type(error).__name__}: {error}); fetch it again"
            ) from error
    raise ConfigurationError(f"{model_dir} has no model.safetensors; fetch the model again")


def _read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (size,) = struct.unpack("<Q", mapping[:8])
    if size > min(_MAX_HEADER, len(mapping) - 8):
        raise ValueError(f"its header says {size} bytes")
    header: dict[str, Any] = json.loads(mapping[8 : 8 + size])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        kind, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if kind not in DTYPES:
            raise ValueError(f"{name} has dtype {kind}")
        dtype, count = DTYPES[kind], int(np.prod(shape, dtype=np.int64))
        if end - begin != count * dtype.itemsize or not 0 <= begin <= end <= len(mapping) - 8 - size:
            raise ValueError(f"{name} does not fill its bytes {begin} to {end}")
        flat = np.frombuffer(mapping, dtype=dtype, count=count, offset=8 + size + begin)
        yield name, Tensor(kind, flat.reshape(shape))
