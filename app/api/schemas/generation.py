"""Fields that every generating endpoint takes, and the objects that all their answers share.

A request struct holds the honoured fields of its table in `app.api.schemas.fields` and nothing else. Types
and plain ranges are checked while msgspec decodes, what needs two fields by the `check_*` functions, what
needs the model by `app.api.translate`. `None` is each field's "not given".
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.api.schemas.limits import (
    INT32,
    INT64,
    MAX_BAD_WORDS,
    MAX_LABEL_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_RESUMABLE_CHOICES,
    MAX_SEQUENCES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from app.api.schemas.structured import ResponseFormat, StructuredOutputs
from app.core.errors import InvalidRequest

StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
LogprobCount = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
TokenId = Annotated[int, Meta(ge=0, lt=INT32)]
TokenCount = Annotated[int, Meta(ge=0, lt=INT32)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}\Z")]
"""Not `$`, which a newline may follow."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    resumable: bool | None = None
    resume_token_ids: Annotated[list[list[TokenId]], Meta(max_length=MAX_RESUMABLE_CHOICES)] | None = None
    """Of each choice, all that the client has; an empty list where it has not kept them."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Honoured fields that mean the same on every generating endpoint."""

    model: str | None = None
    max_tokens: TokenCount | None = None
    min_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=INT32)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    echo: bool | None = None
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
    request_id: RequestId | None = None

    @property
    def num_samples(self) -> int:
        """`n`, default applied."""
        return 1 if self.n is None else self.n

    @property
    def is_resumable(self) -> bool:
        """Whether the events of the stream carry cursors."""
        return self.stream_options is not None and bool(self.stream_options.resumable)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def output_limit(self) -> int | None:
        """Most output tokens, the endpoint's default applied. None: whatever the context leaves."""
        return self.max_tokens

    @property
    def output_limit_field(self) -> str:
        """The field that `output_limit` came from."""
        return "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Candidates to show at each output token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt."""
        return self.prompt_logprobs


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's form of one candidate at one prompt position."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """What of the prompt was not computed anew."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What of the output is not the answer."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request: each prompt once, the output of all samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET
    """Where reasoning is told from answers."""


def check_generation(request: GenerationRequest) -> None:
    """Checks that need several shared fields and no model. Raises InvalidRequest naming the field to change."""
    limit = request.output_limit
    if request.min_tokens is not None and limit is not None and request.min_tokens > limit:
        raise InvalidRequest(
            f"`min_tokens` is {request.min_tokens}, more than `{request.output_limit_field}` ({limit}).",
            param="min_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
    if request.stream_options is not None and request.stream_options.resume_token_ids and not request.is_resumable:
        raise InvalidRequest("`resume_token_ids` needs `resumable: true`.", param="stream_options.resume_token_ids")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest(
            "`prompt_logprobs` is not sent in a stream: leave `stream` or `prompt_logprobs` out.",
            param="prompt_logprobs",
        )
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "`truncate_prompt_tokens` must be -1 (what fits) or at least 1, got 0.", param="truncate_prompt_tokens"
        )
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise InvalidRequest("`truncation_side` needs `truncate_prompt_tokens`.", param="truncation_side")
