"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's shapes."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from app.api.schemas.chat import ChatMessage, Messages, TemplateKwargs, TemplateValue, check_continuation
from app.api.schemas.generation import TokenId
from app.core.errors import InvalidRequest


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text, or messages as chat takes them, to turn into token ids: one of the two."""

    prompt: str | None = None
    messages: Messages | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    """Default: true for a text, false for messages, whose template writes its own."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """The messages of a `TokenizeRequest`, and how they are rendered."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, TemplateValue] | None


class TokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The ids of the text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids to turn into text."""

    tokens: Annotated[list[TokenId], Meta(max_length=1_000_000)]
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


def conversation_of(request: TokenizeRequest) -> TokenizedConversation | None:
    """The messages; None where the request has a text. Raises InvalidRequest where it has both or neither."""
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("Either `prompt` or `messages` is required, and not both.", param="prompt")
    if request.messages is not None:
        check_continuation(
            continue_final_message=request.continue_final_message, add_generation_prompt=request.add_generation_prompt
        )
        return TokenizedConversation(
            request.messages,
            request.add_generation_prompt,
            request.continue_final_message,
            request.chat_template_kwargs,
        )
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(request, name) is not None:
            raise InvalidRequest(f"`{name}` needs `messages`.", param=name)
    return None
