"""A .gguf file to be served as it is: an index of its tensors under the names of transformers.

Blocks of 32 (Q4_0, Q4_1, Q8_0) and float vectors stay where they lie in model.gguf. Matrices of other kinds become
Q8_0 blocks once, in model.int8.bin beside it. `app.runner.native.blocks` reads both.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from app.core.errors import ConfigurationError
from app.store.cache import Report
from app.store.folder import BLOCKS_INDEX, GGUF_WEIGHTS
from app.store.gguf_config import GgufModel
from app.store.gguf_file import GgufTensor
from app.store.gguf_weights import WeightTarget, check_tensors, weight_targets

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_INT8_WEIGHTS = "model.int8.bin"
_KEPT_BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of 32 weights."""
_KEPT_VECTORS = ("F32", "F16", "BF16")
_CHUNK_ELEMENTS = 4 << 20
_ALIGNMENT = 64


def write_block_index(model: GgufModel, folder: Path, *, report: Report) -> dict[str, str]:
    """Write the index, and the int8 file where it is needed, into `folder`.

    Returns:
        sha256 by file name, for those that were hashed while they were written.

    Raises:
        ConfigurationError: a tensor is missing, unexpected, or holds values that are not finite.
    """
    targets = weight_targets(model)
    check_tensors(model, targets)
    others = [t.source for t in targets.values() if not _is_kept(model.file.tensors[t.source])]
    digests: dict[str, str] = {}
    entries: dict[str, object] = {}
    converted = _Int8File(model, folder / _INT8_WEIGHTS) if others else None
    try:
        for name, target in targets.items():
            tensor = model.file.tensors[target.source]
            if _is_kept(tensor) or converted is None:
                _check_finite(model, tensor)
                entries[name] = _entry(GGUF_WEIGHTS, tensor.type_name, target, tensor.offset)
            else:
                entries[name] = _entry(_INT8_WEIGHTS, "Q8_0", target, converted.add(tensor))
    finally:
        if converted is not None:
            converted.file.close()
            digests[_INT8_WEIGHTS] = converted.digest.hexdigest()
    if others:
        kinds = Counter(model.file.tensors[source].type_name for source in others)
        counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
        report(f"{counts}: kinds that are not served as they are became int8, in blocks of 32")
    (folder / BLOCKS_INDEX).write_text(json.dumps({"tensors": entries}))
    return digests


def _is_kept(tensor: GgufTensor) -> bool:
    return tensor.type_name in (_KEPT_VECTORS if len(tensor.shape) == 1 else _KEPT_BLOCKS)


def _entry(file: str, kind: str, target: WeightTarget, offset: int) -> dict[str, object]:
    return {
        "file": file,
        "kind": kind,
        "shape": target.shape,
        "offset": offset,
        "permuted_heads": target.permuted_heads,
        "added": target.added,
    }


def _check_finite(model: GgufModel, tensor: GgufTensor) -> None:
    """Scales and minima are all that can be other than finite in a block."""
    import numpy as np

    raw = model.file.raw(tensor)
    if tensor.type_name in _KEPT_BLOCKS:
        halves = 2 if tensor.type_name == "Q4_1" else 1
        blocks = raw.reshape(-1, _KEPT_BLOCKS[tensor.type_name])
        is_finite = bool(np.isfinite(blocks[:, : 2 * halves].copy().view(np.float16)).all())
    elif tensor.type_name == "BF16":
        is_finite = not bool((raw.view(np.uint16) & 0x7F80 == 0x7F80).any())
    else:
        is_finite = bool(np.isfinite(raw.view(np.float32 if tensor.type_name == "F32" else np.float16)).all())
    if not is_finite:
        raise _damaged(model, tensor)


def _damaged(model: GgufModel, tensor: GgufTensor) -> ConfigurationError:
    return ConfigurationError(
        f"{model.file.path}: the tensor {tensor.name!r} holds values that are not finite; the file is damaged"
    )


class _Int8File:
    """Appends matrices as Q8_0 blocks, hashing on the way."""

    def __init__(self, model: GgufModel, path: Path) -> None:
        self._model = model
        self.file: BinaryIO = path.open("wb")
        self.digest = hashlib.sha256()
        self._position = 0

    def add(self, tensor: GgufTensor) -> int:
        """Write a tensor; returns where it begins."""
        if len(tensor.shape) != 2 or tensor.shape[1] % 32:
            raise ConfigurationError(
                f"{self._model.file.path}: {tensor.name!r} is {tensor.type_name} of shape {tensor.shape}, which does "
                "not fit blocks of 32; serve the file in bfloat16 (leave out --quantization)"
            )
        self._write(bytes(-self._position % _ALIGNMENT))
        begin, step = self._position, max(1, _CHUNK_ELEMENTS // tensor.shape[1])
        for first in range(0, tensor.shape[0], step):
            self._write(self._blocks(tensor, first, first + step).tobytes())
        return begin

    def _blocks(self, tensor: GgufTensor, first: int, end: int) -> "npt.NDArray[np.uint8]":
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quantize

        values = dequantize(self._model.file.raw(tensor)[first:end], GGMLQuantizationType(tensor.type_id))
        if not np.isfinite(values).all():
            raise _damaged(self._model, tensor)
        blocks: npt.NDArray[np.uint8] = quantize(values.astype(np.float32, copy=False), GGMLQuantizationType.Q8_0)
        return blocks

    def _write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)
        self._position += len(data)
