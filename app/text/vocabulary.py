"""Owns the table from token id to raw bytes, derived from the kind of decoder a tokenizer.json names.

Two kinds have an exact table, where the text of a sequence is the UTF-8 decoding of its tokens' bytes:
byte-level BPE (GPT-2's 256 printable stand-ins for bytes) and byte-fallback (sentencepiece's ▁ and
<0xNN>). Every other decoder (WordPiece, Metaspace, none) is `DecoderKind.OTHER`: its tokens change
with their neighbours, so text comes from the library over a window of ids.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import tokenizers

_SPACE = "▁"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class DecoderKind(StrEnum):
    """How token strings become text."""

    BYTE_LEVEL = "byte_level"
    BYTE_FALLBACK = "byte_fallback"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each id stands for. Ids without a token have no bytes."""

    kind: DecoderKind
    token_bytes: tuple[bytes, ...]
    """Indexed by id."""
    visible_bytes: tuple[bytes, ...]
    """The same with special tokens empty."""
    special_ids: frozenset[int]
    strips_leading_space: bool
    """The decoder drops one space at the start of the whole text."""
    dropped_bytes: bytes | None
    """Bytes that encoding leaves out, having no token for them; None where more may be lost than these."""

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer) -> "Vocabulary":
        """Read the vocabulary of a loaded tokenizer; a few tens of milliseconds for 100,000 tokens."""
        kind, strips = _classify(describe(tokenizer.decoder))
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        to_bytes = _bytes_of(kind, tokenizer)
        for token, token_id in vocab.items():
            table[token_id] = to_bytes(token, token_id)
        special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        visible = tuple(b"" if i in special else data for i, data in enumerate(table))
        return cls(kind, tuple(table), visible, special, strips, _dropped_bytes(kind, vocab, tokenizer.model))


def describe(component: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as it is written in tokenizer.json; None where the tokenizer has no such part."""
    if component is None:
        return None
    description: dict[str, Any] = json.loads(component.__getstate__())
    return description


def byte_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins: printable Latin-1 for itself, the other 68 bytes as U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


def _classify(decoder: Mapping[str, Any] | None) -> tuple[DecoderKind, bool]:
    match _steps(decoder):
        case [{"type": "ByteLevel"}]:
            return DecoderKind.BYTE_LEVEL, False
        case [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, *rest]:
            return _classify_fallback(rest)
        case _:
            return DecoderKind.OTHER, False


def _classify_fallback(rest: Sequence[Mapping[str, Any]]) -> tuple[DecoderKind, bool]:
    match rest:
        case [] | [{"type": "Fuse"}]:
            return DecoderKind.BYTE_FALLBACK, False
        case [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return DecoderKind.BYTE_FALLBACK, True
        case _:
            return DecoderKind.OTHER, False


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _bytes_of(kind: DecoderKind, tokenizer: tokenizers.Tokenizer) -> Callable[[str, int], bytes]:
    if kind is DecoderKind.BYTE_LEVEL:
        return _byte_level_bytes()
    if kind is DecoderKind.BYTE_FALLBACK:
        return _byte_fallback_bytes
    return lambda _, token_id: tokenizer.decode([token_id], skip_special_tokens=False).encode()


def _byte_level_bytes() -> Callable[[str, int], bytes]:
    alphabet = {ord(char): chr(byte) for char, byte in byte_alphabet().items()}
    # Characters below 256 that stand for no byte must not pass as themselves: they make the encoding fail.
    outside = {code: "\uffff" for code in range(256) if code not in alphabet}
    translation = alphabet | outside

    def to_bytes(token: str, _: int) -> bytes:
        try:
            return token.translate(translation).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()  # an added token in plain text: the library's rule, token by token

    return to_bytes


def _byte_fallback_bytes(token: str, _: int) -> bytes:
    match = _FALLBACK.fullmatch(token)
    return bytes.fromhex(match[1]) if match else token.replace(_SPACE, " ").encode()


def _dropped_bytes(kind: DecoderKind, vocab: Mapping[str, int], model: tokenizers.models.Model) -> bytes | None:
    if not isinstance(model, tokenizers.models.BPE) or kind is DecoderKind.OTHER:
        return None
    if kind is DecoderKind.BYTE_FALLBACK:
        # A character is written in bytes only if each of them has a token; else it joins an unknown token.
        return b"" if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)) else None
    missing = bytes(byte for char, byte in byte_alphabet().items() if char not in vocab)
    has_token_each = model.unk_token is not None and not model.fuse_unk
    return b"" if has_token_each else missing
