"""Writes small GGUF files for tests, byte by byte, so that broken ones can be made as well as good ones."""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8}
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
