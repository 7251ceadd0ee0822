"""Builds tokenizer.json from the vocabulary of a GGUF file.

A token id is only right when the text is cut as it was in training, before any merge. GGUF names that
cut (`tokenizer.ggml.pre`) instead of storing it, so `PRE_TOKENIZERS` holds one row per known name, with
the expressions of the models themselves (those of llama.cpp are adaptations of the same). A name that is
not in the table is refused: a guess would give fluent text from the wrong ids.

Byte-level BPE (`tokenizer.ggml.model` = gpt2) is built here, SentencePiece in `gguf_sentencepiece`.
"""

import json
from collections.abc import Mapping
from itertools import pairwise

import msgspec

from app.core.errors import ConfigurationError
from app.store.gguf_file import GgufFile
from app.store.gguf_sentencepiece import sentencepiece_parts

Json = dict[str, object]

_CONTROL, _USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type` of tokens that are matched in the text before it is cut."""


class PreTokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """How text is cut into words before byte-level merges."""

    splits: tuple[str, ...] = ()
    """Regular expressions applied one after the other; matches and what lies between stand alone."""
    gpt2_words: bool = False
    """Apply GPT-2's own expression after them."""
    nfc: bool = False
    """The model's tokenizer composes characters first."""
    ignore_merges: bool = False
    """A word that is in the vocabulary is one token, whatever the merges say."""
    adds_bos: bool = False
    """Whether BOS begins the text where the file does not say."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = PreTokenizer(gpt2_words=True)
_DIGITS_GPT2 = PreTokenizer(splits=(r"\p{N}",), gpt2_words=True)
_LLAMA3 = PreTokenizer(splits=(_LLAMA3_WORDS,), ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer(splits=(_QWEN2_WORDS,), nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""By the value of `tokenizer.ggml.pre`. Each is checked against llama.cpp's ids in the tests."""


def tokenizer_files(file: GgufFile, *, vocab_size: int) -> dict[str, str]:
    """The texts of tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

    Args:
        vocab_size: rows of the embedding matrix; no token id may reach it.

    Raises:
        ConfigurationError: an unknown tokenizer model or pre-tokenizer, or a broken vocabulary.
    """
    from tokenizers import Tokenizer

    text = json.dumps(_tokenizer_json(file, vocab_size=vocab_size), ensure_ascii=False, separators=(",", ":"))
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigurationError(f"{file.path} has a vocabulary that does not hold together: {error}") from error
    files = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(_tokenizer_config(file), indent=2) + "\n"}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template
    return files


def _tokenizer_json(file: GgufFile, *, vocab_size: int) -> Json:
    tokens = _tokens(file, vocab_size=vocab_size)
    types = _token_types(file, tokens)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        parts = sentencepiece_parts(file, tokens, types)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(tokens, types),
            "pre_tokenizer": None,
            "post_processor": _post_processor(file, tokens, adds_bos=True),
            **parts._asdict(),
        }
    if kind != "gpt2":
        raise ConfigurationError(
            f"{file.path} has a tokenizer of the kind {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) are read from a .gguf. Serve the model's safetensors folder instead"
        )
    return _byte_level_json(file, tokens, types)


def _byte_level_json(file: GgufFile, tokens: list[str], types: list[int]) -> Json:
    pre = _pre_tokenizer(file)
    byte_level: Json = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": _pre_tokenizer_json(pre),
        "post_processor": _post_processor(file, tokens, adds_bos=pre.adds_bos, first=byte_level),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": _merges(file),
        },
    }


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ConfigurationError(
            f"{file.path} cuts text in a way named {name!r} (tokenizer.ggml.pre), which is not known here; known are "
            f"{known}. A guess would give wrong token ids: serve the model's safetensors folder instead"
        )
    if file.metadata.get("tokenizer.ggml.add_space_prefix") is True:
        raise ConfigurationError(f"{file.path} adds a space before the text; that is not supported with {name!r}")
    return PRE_TOKENIZERS[name]


def _tokens(file: GgufFile, *, vocab_size: int) -> list[str]:
    tokens = _strings(file, "tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= vocab_size:
        raise ConfigurationError(f"{file.path} has {len(tokens)} tokens for {vocab_size} rows of embeddings")
    if len(set(tokens)) != len(tokens):
        token = next(one for one, next_one in pairwise(sorted(tokens)) if one == next_one)
        raise ConfigurationError(f"{file.path} has the token {token!r} twice in its vocabulary")
    return tokens


def _token_types(file: GgufFile, tokens: list[str]) -> list[int]:
    types = file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens) or not all(isinstance(kind, int) for kind in types):
        raise ConfigurationError(f"{file.path} lacks a type for each of its {len(tokens)} tokens")
    return [int(kind) for kind in types]


def _added_tokens(tokens: list[str], types: list[int]) -> list[Json]:
    return [
        {
            "id": token_id,
            "content": tokens[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for token_id, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED) and tokens[token_id]
    ]


def _pre_tokenizer_json(pre: PreTokenizer) -> Json:
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in pre.splits
    ]
    steps.append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.gpt2_words},
    )
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _post_processor(file: GgufFile, tokens: list[str], *, adds_bos: bool, first: Json | None = None) -> Json | None:
    before = _added_id(file, tokens, "bos", default=adds_bos)
    after = _added_id(file, tokens, "eos", default=False)
    if before is None and after is None:
        return first
    single: list[Json] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair: list[Json] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special: dict[str, Json] = {}
    for token_id, at_start in ((before, True), (after, False)):
        if token_id is None:
            continue
        token = tokens[token_id]
        part: Json = {"SpecialToken": {"id": token, "type_id": 0}}
        special[token] = {"id": token, "ids": [token_id], "tokens": [token]}
        single = [part, *single] if at_start else [*single, part]
        pair = [part, *pair] if at_start else [*pair, part]
    template: Json = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    return template if first is None else {"type": "Sequence", "processors": [first, template]}


def _added_id(file: GgufFile, tokens: list[str], name: str, *, default: bool) -> int | None:
    """The id that encoding adds at an end of the text, or None."""
    if not file.metadata.get(f"tokenizer.ggml.add_{name}_token", default):
        return None
    token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ConfigurationError(f"{file.path} asks for a {name.upper()} token and names none (id {token_id!r})")
    return token_id


def _merges(file: GgufFile) -> list[list[str]]:
    merges: list[list[str]] = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        middle = merge.find(" ", 1)
        if middle < 0:
            raise ConfigurationError(f"{file.path} has the merge {merge!r}, which joins nothing")
        merges.append([merge[:middle], merge[middle + 1 :]])
    return merges


def _tokenizer_config(file: GgufFile) -> Json:
    tokens = _strings(file, "tokenizer.ggml.tokens")
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for field, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            config[field] = tokens[token_id]
    return config


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigurationError(f"{file.path} lacks {key}; it holds no usable tokenizer")
    return [str(item) for item in value]
