"""Reads the structure of a GGUF file: metadata and where each tensor lies. Owns no conversion.

A file is untrusted. Every count and length is checked against the bytes that are left before anything
is allocated, so a truncated or lying file costs one `ConfigurationError`, never memory or a traceback.
Tensor bytes stay in the file; `GgufFile.raw` maps them.
"""

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.core.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

GgufScalar = bool | int | float | str
GgufValue = GgufScalar | list[bool] | list[int] | list[float] | list[str]

_SCALAR_FORMATS: Mapping[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_SMALLEST_ENTRY = 13
"""Bytes of the shortest possible metadata entry: an empty key, a type, one byte."""
_SMALLEST_TENSOR = 32
"""Bytes of the shortest possible tensor description: an empty name, one dimension."""


class GgufTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies and what it is."""

    name: str
    shape: tuple[int, ...]
    """As numpy and torch count: the last dimension is contiguous (GGUF stores the reverse)."""
    type_id: int
    type_name: str
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


class GgufFile(msgspec.Struct, frozen=True):
    """The parsed structure of one file."""

    path: Path
    metadata: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]

    def raw(self, tensor: GgufTensor) -> "npt.NDArray[np.uint8]":
        """The stored bytes of a tensor as (rows, bytes per row), mapped and read-only."""
        import numpy as np

        num_rows = 1
        for size in tensor.shape[:-1]:
            num_rows *= size
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.num_bytes,))
        return mapped.reshape(num_rows, tensor.num_bytes // num_rows)


def read_gguf(path: Path) -> GgufFile:
    """Parse `path`.

    Raises:
        ConfigurationError: not a GGUF file of version 2 or 3, truncated, or inconsistent.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Parser(path, view).parse()
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise ConfigurationError(f"{path} cannot be read as a GGUF file: {error}") from error


class _Parser:
    """A cursor over the mapped file."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._position = 0

    def parse(self) -> GgufFile:
        num_tensors, num_entries = self._header()
        metadata: dict[str, GgufValue] = {}
        for _ in range(num_entries):
            key = self._string("a metadata key")
            if key in metadata:
                raise self._broken(f"the metadata key {key!r} stands there twice")
            metadata[key] = self._value(int(self._scalar(4)), key)
        descriptions = [self._tensor_description() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 1 << 20:
            raise self._broken(f"general.alignment is {alignment!r}, expected a small positive number")
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in descriptions:
            if name in tensors:
                raise self._broken(f"the tensor {name!r} stands there twice")
            tensors[name] = self._tensor(name, shape, type_id, offset=data_start + offset)
        return GgufFile(self._path, metadata, tensors)

    def _header(self) -> tuple[int, int]:
        if self._take(4, "the magic") != b"GGUF":
            raise self._broken("it does not begin with the letters GGUF; is it a complete .gguf file?")
        version = int(self._scalar(4))
        if version not in (2, 3):
            remedy = "it is big-endian" if version & 0xFFFF == 0 else "convert it anew with a current llama.cpp"
            raise self._broken(f"its version is {version}, only 2 and 3 are read ({remedy})")
        num_tensors, num_entries = int(self._scalar(10)), int(self._scalar(10))
        self._check_count(num_entries, _SMALLEST_ENTRY, "metadata entries")
        self._check_count(num_tensors, _SMALLEST_TENSOR, "tensors")
        return num_tensors, num_entries

    def _value(self, type_id: int, key: str) -> GgufValue:
        if type_id == _STRING:
            return self._string(key)
        if type_id == _ARRAY:
            return self._array(key)
        if type_id not in _SCALAR_FORMATS:
            raise self._broken(f"{key} has the unknown value type {type_id}")
        return self._scalar(type_id)

    def _array(self, key: str) -> GgufValue:
        type_id, count = int(self._scalar(4)), int(self._scalar(10))
        if type_id == _STRING:
            self._check_count(count, 8, f"strings of {key}")
            return [self._string(key) for _ in range(count)]
        if type_id not in _SCALAR_FORMATS:
            raise self._broken(f"{key} is an array of the unsupported value type {type_id}")
        code = _SCALAR_FORMATS[type_id][1]
        width = struct.calcsize("<" + code)
        self._check_count(count, width, f"values of {key}")
        return list(struct.unpack(f"<{count}{code}", self._take(count * width, key)))

    def _tensor_description(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor name")
        num_dimensions = int(self._scalar(4))
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._broken(f"the tensor {name!r} has {num_dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(reversed([int(self._scalar(10)) for _ in range(num_dimensions)]))
        return name, shape, int(self._scalar(4)), int(self._scalar(10))

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, *, offset: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
        except (ValueError, KeyError):
            raise self._broken(f"the tensor {name!r} has the unknown type {type_id}") from None
        num_elements = 1
        for size in shape:
            num_elements *= size
        if num_elements == 0 or shape[-1] % block_size:
            raise self._broken(f"the tensor {name!r} has the impossible shape {shape} for its type")
        num_bytes = num_elements // block_size * block_bytes
        if offset + num_bytes > self._size:
            raise self._broken(
                f"the tensor {name!r} ends at byte {offset + num_bytes} of {self._size}: the file is truncated"
            )
        return GgufTensor(name, shape, type_id, GGMLQuantizationType(type_id).name, offset, num_bytes)

    def _scalar(self, type_id: int) -> GgufScalar:
        code = _SCALAR_FORMATS[type_id]
        value: GgufScalar = struct.unpack(code, self._take(struct.calcsize(code), "a value"))[0]
        return value

    def _string(self, what: str) -> str:
        length = int(self._scalar(10))
        self._check_count(length, 1, f"bytes of {what}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(f"{what} is not valid UTF-8") from None

    def _take(self, count: int, what: str) -> bytes:
        end = self._position + count
        if end > self._size:
            raise self._broken(f"it ends inside {what}: the file is truncated")
        taken = self._view[self._position : end]
        self._position = end
        return taken

    def _check_count(self, count: int, smallest: int, what: str) -> None:
        left = self._size - self._position
        if count * smallest > left:
            raise self._broken(f"it announces {count} {what} and has {left} bytes left")

    def _broken(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self._path} is not a usable GGUF file: {why}")
