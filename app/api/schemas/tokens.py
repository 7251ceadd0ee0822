"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's shapes."""

from typing import Annotated

import msgspec
from msgspec import Meta


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text to turn into token ids."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The ids of the text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids to turn into text."""

    tokens: Annotated[list[int], Meta(max_length=1_000_000)]
    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The text of the ids, special tokens included."""

    prompt: str
    token_strs: list[str] | msgspec.UnsetType = msgspec.UNSET
    """Where asked for: each token alone, as in log-probabilities."""


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What evaluation harnesses ask before they send token ids."""

    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
