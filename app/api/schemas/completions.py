"""`POST /v1/completions`: the body's typed form and the objects of its answers."""

from typing import Literal

import msgspec

from app.api.schemas.generation import (
    GenerationRequest,
    LogprobCount,
    PromptLogprobs,
    TokenId,
    Usage,
    check_generation,
)
from app.api.schemas.limits import DEFAULT_MAX_TOKENS, MAX_PROMPTS, MAX_SEQUENCES
from app.core.errors import InvalidRequest

Prompt = str | list[str | TokenId | list[TokenId]]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Honoured fields of a completion request."""

    prompt: Prompt
    logprobs: LogprobCount | None = None

    @property
    def output_limit(self) -> int:
        """`max_tokens`, default applied."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """`logprobs` is the count itself."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The larger of what `prompt_logprobs` and `echo` with `logprobs` ask for."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)


class CompletionLogprobs(msgspec.Struct):
    """OpenAI's log-probabilities of a completion: four lists of one length, one entry a token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One sequence's answer, whole or as a chunk of a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class CompletionResponse(msgspec.Struct, kw_only=True):
    """The whole answer, and the shape of each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    system_fingerprint: str
    seed: int | msgspec.UnsetType = msgspec.UNSET
    """The seed that repeats this answer; an extension of Headwater."""


def check_completion(request: CompletionRequest) -> None:
    """Checks that need several fields and no model. Raises InvalidRequest naming the field to change."""
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest(
            "`max_tokens` is 0, which asks for nothing: it is allowed with `echo: true` alone.", param="max_tokens"
        )
    check_generation(request)


def check_prompt_count(raw: msgspec.Raw) -> None:
    """Refuse far too many lists of ids before they are made: a body has room for hundreds of thousands.

    Raises InvalidRequest.
    """
    text = bytes(raw)
    count = text.count(b"[") - 1
    if count <= MAX_PROMPTS:
        return
    if b'"' in text:  # brackets may stand in texts
        try:
            count = len(msgspec.json.decode(text, type=list[msgspec.Raw]))
        except msgspec.MsgspecError:
            return  # no list
    if count > MAX_PROMPTS:
        raise InvalidRequest(f"`prompt` holds {count} lists; at most {MAX_PROMPTS}.", param="prompt")


def prompt_list(request: CompletionRequest) -> list[str | list[int]]:
    """The request's prompts, each a text or token ids. Raises InvalidRequest where there is none or too many."""
    prompt = request.prompt
    prompts: list[str | list[int]] = [prompt] if isinstance(prompt, str) else _split_prompts(prompt)
    if not prompts or any(len(one) == 0 for one in prompts):
        raise InvalidRequest("`prompt` is empty: it must hold at least one token.", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"`prompt` holds {len(prompts)} prompts; at most {MAX_PROMPTS}.", param="prompt")
    num_sequences = len(prompts) * request.num_samples
    if num_sequences > MAX_SEQUENCES:
        raise InvalidRequest(f"`n` times the number of prompts is {num_sequences}; at most {MAX_SEQUENCES}.", param="n")
    return prompts


def _split_prompts(prompt: list[str | int | list[int]]) -> list[str | list[int]]:
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [[item for item in prompt if isinstance(item, int)]]
    if int in kinds:
        raise InvalidRequest(
            "`prompt` mixes token ids with other items: send one list of ids, or lists of ids and strings.",
            param="prompt",
        )
    return [item for item in prompt if not isinstance(item, int)]
