"""Writes small GGUF files for tests, byte by byte, so that broken ones can be made as well as good ones."""

import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8}
Tensor = tuple[tuple[int, ...], str, bytes]
"""Shape as numpy counts, type name, stored bytes."""


def write_gguf(path: Path, metadata: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """Write a GGUF file of version 3."""
    path.write_bytes(gguf_bytes(metadata, tensors))


def gguf_bytes(metadata: dict[str, object], tensors: dict[str, Tensor]) -> bytes:
    """The content of such a file."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += packed_string(key) + _packed_value(value)
    data = b""
    for name, (shape, type_name, stored) in tensors.items():
        head += packed_string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", GGUF_TYPES[type_name], len(data))
        data += stored + b"\0" * (-len(stored) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def float_tensor(values: npt.NDArray[np.float32]) -> Tensor:
    """An array stored as it is."""
    return values.shape, "F32", values.astype(np.float32).tobytes()


def packed_string(text: str) -> bytes:
    """Length and bytes."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _packed_value(value: object) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + packed_string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(packed_string(item) for item in value)
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    raise TypeError(f"no GGUF type for {value!r}")


def byte_alphabet() -> list[str]:
    """GPT-2's character for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def tokenizer_fields(vocabulary: dict[str, list[str]], *, pre: str) -> dict[str, object]:
    """Metadata of a byte-level tokenizer whose first three tokens are SmolLM2's end, start and end of turn."""
    tokens = vocabulary["tokens"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": vocabulary["merges"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def sentencepiece_fields(tokens: list[str]) -> dict[str, object]:
    """Metadata of a SentencePiece tokenizer: unknown, start, end, 256 bytes, then pieces, the best first."""
    num_pieces = len(tokens) - 259
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-rank) for rank in range(num_pieces)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * num_pieces,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def small_model_fields(model_type: str, *, vocab_size: int, **changes: object) -> dict[str, object]:
    """Metadata of a decoder of two layers: hidden size 64, 4 heads of 16, 2 key and value heads."""
    fields: dict[str, object] = {
        "general.architecture": model_type,
        "general.alignment": 32,
        f"{model_type}.block_count": 2,
        f"{model_type}.context_length": 256,
        f"{model_type}.embedding_length": 64,
        f"{model_type}.feed_forward_length": 96,
        f"{model_type}.attention.head_count": 4,
        f"{model_type}.attention.head_count_kv": 2,
        f"{model_type}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{model_type}.rope.freq_base": 10000.0,
        f"{model_type}.vocab_size": vocab_size,
    }
    fields.update({f"{model_type}.{name}": value for name, value in changes.items()})
    return fields


def small_model_tensors(
    *,
    vocab_size: int,
    seed: int = 0,
    tied: bool = True,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    post_norms: bool = False,
    matrix_types: Sequence[str] = ("Q8_0",),
    spread: float = 1.0,
) -> dict[str, Tensor]:
    """Random tensors for `small_model_fields`; matrices in `matrix_types` by turns, the rest as F32.

    `spread`: standard deviation of the matrices' elements.
    """
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_norm.weight": (64,), f"{block}.ffn_norm.weight": (64,)}
        shapes |= {f"{block}.attn_q.weight": (64, 64), f"{block}.attn_output.weight": (64, 64)}
        shapes |= {f"{block}.attn_k.weight": (32, 64), f"{block}.attn_v.weight": (32, 64)}
        shapes |= {f"{block}.ffn_gate.weight": (96, 64), f"{block}.ffn_up.weight": (96, 64)}
        shapes |= {f"{block}.ffn_down.weight": (64, 96)}
        if qkv_bias:
            shapes |= {f"{block}.attn_q.bias": (64,), f"{block}.attn_k.bias": (32,), f"{block}.attn_v.bias": (32,)}
        if output_bias:
            shapes[f"{block}.attn_output.bias"] = (64,)
        if post_norms:
            shapes |= {f"{block}.post_attention_norm.weight": (64,), f"{block}.post_ffw_norm.weight": (64,)}
        if qk_norm:
            shapes |= {f"{block}.attn_q_norm.weight": (16,), f"{block}.attn_k_norm.weight": (16,)}
    if not tied:
        shapes["output.weight"] = (vocab_size, 64)
    types = itertools.cycle(matrix_types)
    return {name: _random_tensor(random, shape, types, spread) for name, shape in shapes.items()}


def _random_tensor(random: np.random.Generator, shape: tuple[int, ...], types: Iterator[str], spread: float) -> Tensor:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    values = random.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return float_tensor(values)
    type_name = next(types)
    return shape, type_name, quantize(values * np.float32(spread), GGMLQuantizationType[type_name]).tobytes()
