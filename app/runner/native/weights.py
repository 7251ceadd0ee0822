"""A model folder's weights, packed once into the layouts of the kernels; the files are let go after.

Packed weights are the only copy: a tied embedding is looked up in the packed head. Where the head is
int8 the embedding stays bf16, a copy of its own. Blocks of a GGUF file are moved, never computed anew.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ConfigurationError
from app.runner.base import TierUnavailable
from app.runner.native.arena import Arena, aligned, own_arena
from app.runner.native.blocks import (
    BLOCK,
    BlockKind,
    SourceType,
    is_in_blocks,
    kind_of,
    packed_bytes,
    read_blocks,
    unpermuted_rows,
)
from app.runner.native.families import Activation, ModelShape
from app.runner.native.library import CLinear, Library, address
from app.runner.native.precision import Form, Precision
from app.runner.native.safetensors import Tensor, as_float, read_tensors
from app.runner.native.tensor_names import known_tensors

_COLUMNS = 64
_TURN = 16
"""Gate and up columns take turns of this many."""
_ONE_RUN = 1 << 30
_VOCABULARIES = frozenset({"model.embed_tokens", "lm_head"})
_CHUNK = 1 << 22
"""Weights that are quantised at once."""


def padded(count: int) -> int:
    """`count` rounded up to whole column blocks."""
    return -(-count // _COLUMNS) * _COLUMNS


@dataclass(frozen=True)
class PackedLinear:
    """One linear in a kernel's layout."""

    weight: NDArray[Any]
    """bf16 (n_pad / 64, k / 2, 64, 2), int8 (n_pad / 64, k / 4, 64, 4) or blocks (src/blocks.h), flat."""
    n_pad: int
    k: int
    form: Form
    bias: NDArray[np.float32] | None = None
    """(n_pad,)"""
    scale: NDArray[np.float32] | None = None
    """(n_pad,), int8 alone."""
    zero: NDArray[np.int32] | None = None
    """(n_pad,), int8 alone."""
    kind: BlockKind | None = None
    """Of Form.BLOCKS alone."""

    def as_struct(self) -> CLinear:
        """Pointers into the arrays, which must outlive it."""
        return CLinear(
            weight=address(self.weight),
            bias=address(self.bias),
            scale=address(self.scale),
            zero=address(self.zero),
            n_pad=self.n_pad,
            k=self.k,
            byte_rows=self.form.byte_rows,
            blocks=0 if self.kind is None else int(self.kind),
        )


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    attention_norm: NDArray[np.float32]
    mlp_norm: NDArray[np.float32]
    q_norm: NDArray[np.float32] | None
    k_norm: NDArray[np.float32] | None
    attention_norm_bias: NDArray[np.float32] | None = None
    mlp_norm_bias: NDArray[np.float32] | None = None
    post_attention_norm: NDArray[np.float32] | None = None
    post_mlp_norm: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ModelWeights:
    """Everything that the kernels read and never write."""

    layers: tuple[LayerWeights, ...]
    head: PackedLinear
    embedding: PackedLinear
    """A column a token; bf16 or blocks."""
    final_norm: NDArray[np.float32]
    precision: Precision
    num_bytes: int
    digest: str
    """sha256 over names, types and bytes of the source tensors."""
    final_norm_bias: NDArray[np.float32] | None = None
    positions: NDArray[np.float32] | None = None
    """(max_positions, hidden_pad), flat."""
    block_types: tuple[str, ...] = ()
    """Of weights in blocks, the most frequent first."""


def load_weights(
    model_dir: Path,
    shape: ModelShape,
    library: Library,
    *,
    precision: Precision,
    num_threads: int,
    make_arena: Callable[[int], Arena] = own_arena,
) -> ModelWeights:
    """Map, check and pack into the arena that is made.

    Raises ConfigurationError (broken files), TierUnavailable (tensors unknown).
    """
    tensors = read_blocks(model_dir) if is_in_blocks(model_dir) else read_tensors(model_dir)
    known = known_tensors(tensors, shape.names, _part_sizes(shape))
    packer = _Packer(shape, library, known, precision, make_arena)
    layers = tuple(packer.layer(index) for index in range(shape.num_layers))
    head, embedding = packer.head_and_embedding()
    final_norm, final_norm_bias = packer.norm("model.norm"), packer.norm_bias("model.norm")
    positions = packer.positions()
    packer.refuse_left_over()
    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        digest = pool.submit(_digest, tensors)
        for done in [pool.submit(job) for job in packer.jobs]:
            done.result()
        return ModelWeights(
            layers,
            head,
            embedding,
            final_norm,
            precision,
            packer.arena.num_bytes,
            digest.result(),
            final_norm_bias=final_norm_bias,
            positions=positions,
            block_types=tuple(kind.name for kind, _ in packer.block_types.most_common()),
        )


def _part_sizes(shape: ModelShape) -> dict[str, int]:
    """Rows of what some families fuse."""
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "mlp.gate_proj": shape.intermediate}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.kind} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor.values).data)
    return digest.hexdigest()


@dataclass
class _Packer:
    """Lays out all weights in one arena and notes the copying still to do in `jobs`."""

    shape: ModelShape
    library: Library
    tensors: dict[str, Tensor]
    precision: Precision
    make_arena: Callable[[int], Arena]
    jobs: list[Callable[[], None]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    block_types: Counter[SourceType] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.arena = self.make_arena(self._arena_bytes())

    def layer(self, index: int) -> LayerWeights:
        shape, forms, prefix = self.shape, self.precision, f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        qkv = [(attention + "q_proj", q_size), (attention + "k_proj", kv_size), (attention + "v_proj", kv_size)]
        hidden, has_post_norms = shape.hidden, shape.names.has_post_norms
        attention_norm, mlp_norm = prefix + "input_layernorm", prefix + "post_attention_layernorm"
        return LayerWeights(
            qkv=self.linear(qkv, k=hidden, form=forms.qkv, has_bias=shape.qkv_bias),
            output=self.linear(
                [(attention + "o_proj", hidden)], k=q_size, form=forms.output, has_bias=shape.output_bias
            ),
            gate_up=self.gate_up(mlp),
            down=self.linear(
                [(mlp + "down_proj", hidden)], k=shape.intermediate, form=forms.down, has_bias=shape.mlp_bias
            ),
            attention_norm=self.norm(attention_norm),
            mlp_norm=self.norm(mlp_norm),
            q_norm=self._head_norm(attention + "q_norm.weight"),
            k_norm=self._head_norm(attention + "k_norm.weight"),
            attention_norm_bias=self.norm_bias(attention_norm),
            mlp_norm_bias=self.norm_bias(mlp_norm),
            post_attention_norm=self.norm(prefix + "post_attention_norm") if has_post_norms else None,
            post_mlp_norm=self.norm(prefix + "post_mlp_norm") if has_post_norms else None,
        )

    def linear(self, parts: list[tuple[str, int]], *, k: int, form: Form, has_bias: bool) -> PackedLinear:
        """Linears side by side: their columns one after the other."""
        packed = self._empty(sum(size for _, size in parts), k, form=form, has_bias=has_bias, names=dict(parts))
        column = 0
        for name, size in parts:
            self._fill(packed, name, size, column=column, run=_ONE_RUN, stride=0)
            column += size
        return packed

    def gate_up(self, prefix: str) -> PackedLinear:
        """Gate and up columns in turns, so that one tile holds both halves of silu(gate) * up; or up alone."""
        size = self.shape.intermediate
        if self.shape.activation is Activation.GELU:
            has_bias, form = self.shape.mlp_bias, self.precision.gate_up
            return self.linear([(prefix + "up_proj", size)], k=self.shape.hidden, form=form, has_bias=has_bias)
        names = prefix + "gate_proj", prefix + "up_proj"
        form, has_bias = self.precision.gate_up, self.shape.mlp_bias
        packed = self._empty(2 * size, self.shape.hidden, form=form, has_bias=has_bias, names=names)
        for index, name in enumerate(names):
            self._fill(packed, name, size, column=index * _TURN, run=_TURN, stride=2 * _TURN)
        return packed

    def head_and_embedding(self) -> tuple[PackedLinear, PackedLinear]:
        shape, embed, form = self.shape, "model.embed_tokens", self.precision.head
        embedding = self._vocabulary(embed, self._embedding_form)
        if shape.is_tied and "lm_head.weight" in self.tensors:
            self.used.add("lm_head.weight")  # a copy that some exporters keep
        if shape.is_tied and form is embedding.form:
            return embedding, embedding
        return self._vocabulary(embed if shape.is_tied else "lm_head", form), embedding

    @property
    def _embedding_form(self) -> Form:
        return Form.BLOCKS if self.precision.head is Form.BLOCKS else Form.BF16

    def _vocabulary(self, name: str, form: Form) -> PackedLinear:
        packed = self._empty(self.shape.vocab_size, self.shape.hidden, form=form, has_bias=False, names=(name,))
        self._fill(packed, name, self.shape.vocab_size, column=0, run=_ONE_RUN, stride=0)
        return packed

    def norm(self, name: str) -> NDArray[np.float32]:
        """The weights of a norm of the residual."""
        return self._vector(name + ".weight", self.shape.hidden, offset=self.shape.norm_offset)

    def norm_bias(self, name: str) -> NDArray[np.float32] | None:
        """Its bias, where the family has them."""
        return self._vector(name + ".bias", self.shape.hidden) if self.shape.names.has_norm_bias else None

    def positions(self) -> NDArray[np.float32] | None:
        """Learned embeddings of positions, where the family has them."""
        if not self.shape.names.has_positions:
            return None
        hidden, count = self.shape.hidden, self.shape.max_positions
        out = np.zeros((count, padded(hidden)), dtype=np.float32)
        out[:, :hidden] = as_float(self._tensor("model.positions.weight", (count, hidden)))
        return out.reshape(-1)

    def _vector(self, name: str, size: int, *, offset: float = 0.0) -> NDArray[np.float32]:
        """A float32 copy, zero beyond `size`."""
        out = np.zeros(padded(size), dtype=np.float32)
        out[:size] = as_float(self._tensor(name, (size,))) + np.float32(offset)
        return out

    def refuse_left_over(self) -> None:
        """A tensor that nothing used may be one that changes the result."""
        left = [name for name in self.tensors if name not in self.used]
        if left:
            raise TierUnavailable(f"the model has a tensor {left[0]!r}, which the native kernels do not know")

    def _head_norm(self, name: str) -> NDArray[np.float32] | None:
        return self._vector(name, self.shape.head_dim, offset=self.shape.norm_offset) if self.shape.qk_norm else None

    def _empty(self, n: int, k: int, *, form: Form, has_bias: bool, names: Iterable[str]) -> PackedLinear:
        n_pad = padded(n)
        bias = np.zeros(n_pad, dtype=np.float32) if has_bias else None
        if form is Form.BF16:
            return PackedLinear(self.arena.take(n_pad * k, np.uint16), n_pad, k, form, bias)
        if form is Form.BLOCKS:
            kind = self._kind(names)
            weight = self.arena.take(packed_bytes(kind, n_pad, k), np.uint8)
            return PackedLinear(weight, n_pad, k, form, bias, kind=kind)
        weight = self.arena.take(n_pad * k, np.int8)
        scale, zero = np.zeros(n_pad, dtype=np.float32), np.zeros(n_pad, dtype=np.int32)
        return PackedLinear(weight, n_pad, k, form, bias, scale, zero)

    def _fill(self, packed: PackedLinear, name: str, size: int, *, column: int, run: int, stride: int) -> None:
        source = self._tensor(name + ".weight", (size, packed.k))
        rows = np.arange(size)
        if packed.bias is not None:
            packed.bias[column + rows // run * stride + rows % run] = as_float(self._tensor(name + ".bias", (size,)))
        if packed.kind is not None:
            order = unpermuted_rows(size, source.permuted_heads)
            columns = (column + order // run * stride + order % run).astype(np.int32)
            type_ = self._source_type(name)
            self.block_types[type_] += 1
            self.jobs.append(lambda: self._pack_blocks(packed, source, type_, columns))
        else:
            self.jobs.append(lambda: self._pack(packed, name, source, column=column, run=run, stride=stride))

    def _pack(self, packed: PackedLinear, name: str, source: Tensor, *, column: int, run: int, stride: int) -> None:
        rows = _as_bf16(source, self.library)
        if (at := self.library.first_not_finite(address(rows), rows.size)) >= 0:
            raise _not_finite(name + ".weight", float(as_float(Tensor("BF16", rows.ravel()[at : at + 1]))[0]), at)
        where = (*source.values.shape, column, run, stride)
        if packed.scale is None:
            self.library.pack_bf16(address(packed.weight), address(rows), *where)
        else:
            scales = address(packed.scale), address(packed.zero)
            self.library.pack_int8(address(packed.weight), *scales, address(rows), *where)

    def _pack_blocks(self, packed: PackedLinear, source: Tensor, type_: SourceType, columns: NDArray[np.int32]) -> None:
        k, step = packed.k, max(1, _CHUNK // packed.k)
        for first in range(0, len(columns), step):
            part, where = source.values[first : first + step], columns[first : first + step]
            if source.num_columns is None:
                floats = as_float(Tensor(source.kind, part))
                part = np.empty((len(part), -(-k // BLOCK) * type_.num_bytes), dtype=np.uint8)
                self.library.quantise_rows(address(part), type_, address(floats), len(part), k)
            self.library.pack_blocks(
                address(packed.weight), packed.kind, address(part), type_, len(part), k, address(where)
            )

    def _kind(self, names: Iterable[str]) -> BlockKind:
        return kind_of(self._source_type(name) for name in names)

    def _source_type(self, name: str) -> SourceType:
        """The file's own; where it has numbers, 4 bits, and 8 for what reads and writes tokens."""
        tensor = self.tensors.get(name + ".weight")
        if tensor is not None and tensor.num_columns is not None:
            return SourceType[tensor.kind]
        return SourceType.Q8_0 if name in _VOCABULARIES else SourceType.Q4_1

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ConfigurationError(f"the model's safetensors files have no tensor {name!r}; fetch the model again")
        if tensor.shape != shape:
            raise ConfigurationError(
                f"tensor {name!r} has shape {tensor.shape} and config.json means {shape}; fetch the model again"
            )
        self.used.add(name)
        return tensor

    def _arena_bytes(self) -> int:
        shape = self.shape
        embedding = self._bytes(shape.vocab_size, shape.hidden, self._embedding_form, ("model.embed_tokens",))
        has_own_head = self.precision.head is not self._embedding_form or not shape.is_tied
        head_names = ("model.embed_tokens" if shape.is_tied else "lm_head",)
        head = self._bytes(shape.vocab_size, shape.hidden, self.precision.head, head_names)
        layers = sum(self._layer_bytes(f"model.layers.{index}.") for index in range(shape.num_layers))
        return layers + embedding + (head if has_own_head else 0)

    def _layer_bytes(self, prefix: str) -> int:
        shape, forms = self.shape, self.precision
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv, gate_up = [attention + f"{part}_proj" for part in "qkv"], [mlp + "gate_proj", mlp + "up_proj"]
        if shape.activation is Activation.GELU:
            gate_up = gate_up[1:]
        return (
            self._bytes(q_size + 2 * kv_size, shape.hidden, forms.qkv, qkv)
            + self._bytes(shape.hidden, q_size, forms.output, [attention + "o_proj"])
            + self._bytes(len(gate_up) * shape.intermediate, shape.hidden, forms.gate_up, gate_up)
            + self._bytes(shape.hidden, shape.intermediate, forms.down, [mlp + "down_proj"])
        )

    def _bytes(self, n: int, k: int, form: Form, names: Iterable[str]) -> int:
        if form is Form.BLOCKS:
            return aligned(packed_bytes(self._kind(names), padded(n), k))
        return aligned(padded(n) * k * (2 if form is Form.BF16 else 1))


def _not_finite(name: str, value: float, index: int) -> ConfigurationError:
    """One such weight makes every answer nonsense."""
    return ConfigurationError(f"tensor {name!r} holds {value} at element {index}; fetch or train the model again")


def _as_bf16(tensor: Tensor, library: Library) -> NDArray[np.uint16]:
    """Rows of bf16: the mapped file itself where it holds them."""
    if tensor.kind == "BF16":
        return np.ascontiguousarray(tensor.values)
    values = np.ascontiguousarray(tensor.values, dtype=np.float32)
    out = np.empty(values.shape, dtype=np.uint16)
    library.round_bf16(address(out), address(values), values.size)
    return out
