"""The SentencePiece tokenizers of GGUF files (`tokenizer.ggml.model` = llama) as BPE with byte fallback.

Such a file stores a score for each piece and no merges: a merge is allowed where both halves are pieces,
the best score first. Spaces are written as U+2581, one is put before the text, and what is no piece is
spelt in the 256 byte tokens.
"""

from typing import NamedTuple

from app.core.errors import ConfigurationError
from app.store.gguf_file import GgufFile

Json = dict[str, object]

_SPACE = "\u2581"
_NORMAL, _USER_DEFINED = 1, 4


class SentencePieceParts(NamedTuple):
    """The parts of tokenizer.json that differ from byte-level BPE."""

    normalizer: Json
    decoder: Json
    model: Json


def sentencepiece_parts(file: GgufFile, tokens: list[str], types: list[int]) -> SentencePieceParts:
    """Build the parts.

    Raises:
        ConfigurationError: no score for each piece, a missing byte, or another normalisation than spaces.
    """
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens)
    if missing:
        raise ConfigurationError(f"{file.path} has a SentencePiece vocabulary without the byte token {min(missing)}")
    if file.metadata.get("tokenizer.ggml.remove_extra_whitespaces") is True:
        raise ConfigurationError(f"{file.path} removes extra spaces before it tokenizes, which is not supported")
    if file.metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise ConfigurationError(f"{file.path} has a character map of its own (precompiled_charsmap), not supported")
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ConfigurationError(f"{file.path} lacks a score for each of its {len(tokens)} pieces")
    unknown_id = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown_id, int) or not 0 <= unknown_id < len(tokens):
        raise ConfigurationError(f"{file.path}: tokenizer.ggml.unknown_token_id is {unknown_id!r}")
    adds_space = file.metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    return SentencePieceParts(
        normalizer=_normalizer(adds_space=adds_space),
        decoder=_decoder(adds_space=adds_space),
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[unknown_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": _merges(tokens, types, [float(score) for score in scores]),
        },
    )


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to join two pieces into a third, best score first, then the shorter left half."""
    joined = (_NORMAL, _USER_DEFINED)
    ids = {token: token_id for token_id, token in enumerate(tokens) if types[token_id] in joined}
    ranked = [
        (-scores[token_id], middle, token)
        for token, token_id in ids.items()
        for middle in range(1, len(token))
        if token[:middle] in ids and token[middle:] in ids
    ]
    ranked.sort()
    return [[token[:middle], token[middle:]] for _, middle, token in ranked]


def _normalizer(*, adds_space: bool) -> Json:
    steps: list[Json] = [{"type": "Prepend", "prepend": _SPACE}] if adds_space else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(*, adds_space: bool) -> Json:
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
