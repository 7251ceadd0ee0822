"""`POST /v1/completions`: the body's typed form and the objects of its answers.

`CompletionRequest` holds the honoured fields of `app.api.schemas.fields` and nothing else. Types and
plain ranges are checked while msgspec decodes, what needs two fields is checked by `check_completion`,
what needs the model by `app.api.translate`. `None` is each field's "not given".
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.api.schemas.limits import (
    DEFAULT_MAX_TOKENS,
    INT32,
    INT64,
    MAX_BAD_WORDS,
    MAX_LABEL_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PROMPTS,
    MAX_SEQUENCES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from app.core.errors import InvalidRequest

Prompt = str | list[str | int | list[int]]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
LogprobCount = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Honoured fields of a completion request."""

    model: str | None = None
    prompt: Prompt | None = None
    max_tokens: Annotated[int, Meta(ge=0, lt=INT32)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=INT32)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=INT32)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    prompt_logprobs: LogprobCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=INT32)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_LABEL_CHARS)] | None = None
    priority: Annotated[int, Meta(ge=-INT32, lt=INT32)] | None = None
    request_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None

    @property
    def num_samples(self) -> int:
        """`n`, default applied."""
        return 1 if self.n is None else self.n

    @property
    def output_limit(self) -> int:
        """`max_tokens`, default applied."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionLogprobs(msgspec.Struct):
    """OpenAI's log-probabilities of a completion: four lists of one length, one entry a token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's form of one candidate at one prompt position."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


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


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """What of the prompt was not computed anew."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request: each prompt once, the output of all samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionResponse(msgspec.Struct, kw_only=True):
    """The whole answer, and the shape of each chunk of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    system_fingerprint: str
    seed: int | msgspec.UnsetType = msgspec.UNSET
    """The seed that repeats this answer; an extension of Headwater."""


def check_completion(request: CompletionRequest) -> None:
    """Checks that need several fields and no model. Raises InvalidRequest naming the field to change."""
    _check_lengths(request)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest(
            "`prompt_logprobs` is not sent in a stream: leave `stream` out, or use `echo` with `logprobs`.",
            param="prompt_logprobs",
        )
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "`truncate_prompt_tokens` must be -1 (what fits) or at least 1, got 0.", param="truncate_prompt_tokens"
        )
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise InvalidRequest("`truncation_side` needs `truncate_prompt_tokens`.", param="truncation_side")


def prompt_list(request: CompletionRequest) -> list[str | list[int]]:
    """The request's prompts, each a text or token ids. Raises InvalidRequest where there is none or too many."""
    prompt = request.prompt
    if prompt is None:
        raise InvalidRequest("`prompt` is required: a string, strings, token ids or lists of ids.", param="prompt")
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


def _check_lengths(request: CompletionRequest) -> None:
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest(
            "`max_tokens` is 0, which asks for nothing: it is allowed with `echo: true` alone.", param="max_tokens"
        )
    if request.min_tokens is not None and request.min_tokens > request.output_limit:
        raise InvalidRequest(
            f"`min_tokens` is {request.min_tokens}, more than `max_tokens` ({request.output_limit}).",
            param="min_tokens",
        )
