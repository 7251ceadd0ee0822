"""Writes model.safetensors from the tensors of a GGUF file: every weight once, in bfloat16.

Dequantised in float32 by the gguf package a few rows at a time (memory stays flat whatever the model's
size), rounded to nearest even, laid out as transformers names and orders them. The file must hold
exactly the tensors that its metadata calls for, in the shapes it calls for.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.core.errors import ConfigurationError
from app.store.gguf_config import Family, GgufModel
from app.store.gguf_file import GgufFile, GgufTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CHUNK_ELEMENTS = 4 << 20
"""Elements dequantised at once."""


class WeightTarget(msgspec.Struct, frozen=True):
    """One tensor of the safetensors file and where it comes from."""

    source: str
    shape: tuple[int, ...]
    permuted_heads: int = 0
    """Number of heads whose rows llama.cpp interleaved, 0 where it did not."""
    added: float = 0.0
    """What llama.cpp added to every element of a vector."""


def weight_targets(model: GgufModel) -> dict[str, WeightTarget]:
    """Every tensor that the model must have, by its name in transformers, in the order of the file."""
    hidden, inner = model.hidden_size, model.intermediate_size
    targets = {"model.embed_tokens.weight": WeightTarget("token_embd.weight", (model.vocab_size, hidden))}
    for layer in range(model.num_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for norm, source in _norms(model.family):
            vector = WeightTarget(f"{theirs}.{source}.weight", (hidden,), added=model.family.added_to_norms)
            targets[f"{ours}.{norm}.weight"] = vector
        targets.update(_attention_targets(model, ours, theirs))
        targets[f"{ours}.mlp.gate_proj.weight"] = WeightTarget(f"{theirs}.ffn_gate.weight", (inner, hidden))
        targets[f"{ours}.mlp.up_proj.weight"] = WeightTarget(f"{theirs}.ffn_up.weight", (inner, hidden))
        targets[f"{ours}.mlp.down_proj.weight"] = WeightTarget(f"{theirs}.ffn_down.weight", (hidden, inner))
    added = model.family.added_to_norms
    targets["model.norm.weight"] = WeightTarget("output_norm.weight", (hidden,), added=added)
    if not model.tied:
        targets["lm_head.weight"] = WeightTarget("output.weight", (model.vocab_size, hidden))
    return targets


def _norms(family: Family) -> tuple[tuple[str, str], ...]:
    """Norms of a layer: transformers' name and the file's."""
    if not family.has_post_norms:
        return ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")
    return (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    )


def _attention_targets(model: GgufModel, ours: str, theirs: str) -> Iterator[tuple[str, WeightTarget]]:
    hidden = model.hidden_size
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    permuted = model.family.permuted_rope
    parts = (
        ("q", q_rows, model.num_heads if permuted else 0),
        ("k", kv_rows, model.num_kv_heads if permuted else 0),
        ("v", kv_rows, 0),
    )
    for part, rows, heads in parts:
        weight = WeightTarget(f"{theirs}.attn_{part}.weight", (rows, hidden), heads)
        yield f"{ours}.self_attn.{part}_proj.weight", weight
        if model.attention_bias:
            yield f"{ours}.self_attn.{part}_proj.bias", WeightTarget(f"{theirs}.attn_{part}.bias", (rows,), heads)
    yield f"{ours}.self_attn.o_proj.weight", WeightTarget(f"{theirs}.attn_output.weight", (hidden, q_rows))
    if model.output_bias:
        yield f"{ours}.self_attn.o_proj.bias", WeightTarget(f"{theirs}.attn_output.bias", (hidden,))
    if model.family.qk_norm:
        for part in ("q", "k"):
            added = model.family.added_to_norms
            norm = WeightTarget(f"{theirs}.attn_{part}_norm.weight", (model.head_dim,), added=added)
            yield f"{ours}.self_attn.{part}_norm.weight", norm


def check_tensors(model: GgufModel, targets: dict[str, WeightTarget]) -> None:
    """Refuse a file that lacks a tensor, has one too many, or one of another shape or type.

    Raises:
        ConfigurationError: names the tensor.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    path, tensors = model.file.path, model.file.tensors
    for target in targets.values():
        tensor = tensors.get(target.source)
        if tensor is None:
            raise ConfigurationError(f"{path} lacks the tensor {target.source!r} that its metadata calls for")
        if tensor.shape != target.shape:
            raise ConfigurationError(f"{path}: {tensor.name!r} has the shape {tensor.shape}, expected {target.shape}")
    unknown = set(tensors) - {target.source for target in targets.values()} - {"rope_freqs.weight"}
    if unknown:
        raise ConfigurationError(f"{path} has the tensor {min(unknown)!r}, which a {model.model_type} model has not")
    for tensor in {tensor.type_id: tensor for tensor in tensors.values()}.values():
        try:
            dequantize(model.file.raw(tensor)[:1], GGMLQuantizationType(tensor.type_id))
        except NotImplementedError:
            raise ConfigurationError(
                f"{path}: {tensor.name!r} is stored as {tensor.type_name}, which the gguf package cannot read"
            ) from None


def write_weights(model: GgufModel, path: Path) -> str:
    """Write the safetensors file and return its sha256.

    Raises:
        ConfigurationError: a tensor is missing, unexpected, or holds values that are not finite.
    """
    targets = weight_targets(model)
    check_tensors(model, targets)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(targets)
        digest.update(header)
        file.write(header)
        for target in targets.values():
            for chunk in bfloat16_chunks(model.file, target):
                digest.update(chunk)
                file.write(chunk)
    return digest.hexdigest()


def _header(targets: dict[str, WeightTarget]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, target in targets.items():
        num_bytes = 2
        for size in target.shape:
            num_bytes *= size
        entries[name] = {"dtype": "BF16", "shape": target.shape, "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # data begins aligned, so that a mapping can be used as it is
    return len(text).to_bytes(8, "little") + text


def bfloat16_chunks(file: GgufFile, target: WeightTarget) -> Iterator[bytes]:
    """The bytes of one target, in order, a few rows at a time."""
    import numpy as np

    tensor = file.tensors[target.source]
    num_rows = 1 if len(tensor.shape) == 1 else tensor.shape[0]
    if target.permuted_heads:  # a head's rows change places: whole heads at once
        num_rows = target.permuted_heads
    row_elements = _num_elements(tensor) // num_rows
    step = max(1, _CHUNK_ELEMENTS // row_elements)
    for start in range(0, num_rows, step):
        values = _dequantized(file, tensor, start, min(start + step, num_rows), num_rows=num_rows)
        if target.permuted_heads:
            values = undo_rope_permutation(values, row_length=tensor.shape[-1] if len(tensor.shape) == 2 else 1)
        if target.added:
            values = values - np.float32(target.added)
        yield to_bfloat16(values, path=file.path, name=tensor.name).tobytes()


def _dequantized(
    file: GgufFile, tensor: GgufTensor, start: int, end: int, *, num_rows: int
) -> "npt.NDArray[np.float32]":
    """Rows start to end of the tensor seen as (num_rows, elements per row), in float32."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = file.raw(tensor).reshape(num_rows, -1)[start:end]  # (rows, bytes)
    values: npt.NDArray[np.float32] = dequantize(stored, GGMLQuantizationType(tensor.type_id))
    return values.astype(np.float32, copy=False)


def undo_rope_permutation(heads: "npt.NDArray[np.float32]", *, row_length: int) -> "npt.NDArray[np.float32]":
    """Turn llama.cpp's interleaved pairs (0, 1), (2, 3) .. of a head's rows into transformers' halves.

    Args:
        heads: (num_heads, head_dim * row_length).
        row_length: elements of one row, 1 for a bias.
    """
    pairs = heads.reshape(heads.shape[0], -1, 2, row_length)  # (num_heads, head_dim / 2, 2, row_length)
    return pairs.swapaxes(1, 2).reshape(heads.shape)


def to_bfloat16(values: "npt.NDArray[np.float32]", *, path: Path, name: str) -> "npt.NDArray[np.uint16]":
    """Round to nearest, ties to even, as torch does. Values must be finite."""
    import numpy as np

    if not np.isfinite(values).all():
        raise ConfigurationError(f"{path}: the tensor {name!r} holds values that are not finite; the file is damaged")
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _num_elements(tensor: GgufTensor) -> int:
    num_elements = 1
    for size in tensor.shape:
        num_elements *= size
    return num_elements
