"""What the answers of all generating endpoints share: how tokens are spelled, prompt log-probabilities, usage.

What is impossible (-inf) is -9999.0, since JSON has no infinity. Equal tokens have equal floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from app.api.errors import error_body
from app.api.schemas.chat import ChatCandidate, ChatTokenLogprob
from app.api.schemas.generation import (
    CompletionTokensDetails,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)
from app.api.sequence_text import Delta, SequenceText
from app.api.sse import DONE
from app.core.types import TokenLogprobs
from app.text.tokenizer import Tokenizer

LOWEST = -9999.0


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What is the same in everything that one answer says."""

    request_id: str
    created: int
    """Unix time."""
    model: str
    fingerprint: str
    seed: int
    """As the client would send it to get the same answer."""


class AnswerForm(Protocol):
    """How one endpoint words what its sequences say, in a stream or as a whole. One for each request."""

    def event(self, index: int, delta: Delta) -> bytes:
        """What a delta of sequence `index` is in a stream: whole events."""
        ...

    def end(self) -> bytes:
        """The last events of a stream."""
        ...

    def failure(self, error: Exception) -> bytes:
        """The last events of a stream that fails."""
        ...

    def collect(self, index: int, delta: Delta) -> None:
        """Keep a delta for `whole`."""
        ...

    def whole(self) -> object:
        """The body of an answer that is not a stream, from the collected deltas."""
        ...


class TokenSpelling:
    """How tokens are shown in log-probabilities. Shared by the choices of a request, which repeat tokens."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """The token's text, `bytes:` form, or `token_id:123`."""
        text = self._texts.get(token_id)
        if text is None:
            text = f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)
            self._texts[token_id] = text
        return text

    def raw(self, token_id: int) -> list[int]:
        """The token's bytes."""
        return list(self._tokenizer.token_bytes(token_id))

    def chars(self, token_id: int) -> tuple[int, int]:
        """Characters that begin in the token, and 1 if its first byte goes on with an earlier character."""
        data = self._tokenizer.token_bytes(token_id)
        begun = sum(byte & 0xC0 != 0x80 for byte in data)
        return begun, int(bool(data) and data[0] & 0xC0 == 0x80)


def token_logprob(token_id: int, entry: TokenLogprobs, *, spelling: TokenSpelling, count: int) -> ChatTokenLogprob:
    """OpenAI's form of one output token, with the `count` most likely ones at its place."""
    top = [
        ChatCandidate(spelling.text(other), max(logprob, LOWEST), spelling.raw(other))
        for other, logprob in zip(entry.top_token_ids[:count], entry.top_logprobs, strict=False)
    ]
    return ChatTokenLogprob(spelling.text(token_id), max(entry.logprob, LOWEST), spelling.raw(token_id), top)


def prompt_logprobs_of(
    prompt_token_ids: Sequence[int], entries: Sequence[TokenLogprobs], count: int, *, tokenizer: Tokenizer
) -> PromptLogprobs:
    """vLLM's form, `count` candidates at each position; `entries` are those of positions 1 and up."""
    result: PromptLogprobs = [None]
    for token_id, entry in zip(prompt_token_ids[1:], entries, strict=True):
        candidates = [(token_id, entry.logprob, entry.rank)]
        candidates += [
            (other, logprob, rank)
            for rank, (other, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1)
        ][:count]
        position: dict[str, PromptLogprob] = {}
        for other, logprob, rank in candidates:
            shown = tokenizer.token_text(other)
            position.setdefault(str(other), PromptLogprob(max(logprob, LOWEST), rank, shown))
        result.append(position)
    return result


def usage_of(sequences: Sequence[SequenceText]) -> Usage:
    """Counts of these sequences: each prompt once, with what none of its samples had to compute as cached."""
    prompt_tokens: dict[int, int] = {}
    cached_tokens: dict[int, int] = {}
    for text in sequences:
        key = text.prepared.prompt_index
        prompt_tokens[key] = len(text.prepared.prompt.token_ids)
        cached_tokens[key] = min(cached_tokens.get(key, text.num_cached_tokens), text.num_cached_tokens)
    num_prompt = sum(prompt_tokens.values())
    num_output = sum(text.num_output_tokens for text in sequences)
    usage = Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(sum(cached_tokens.values())))
    if not any(text.splits_reasoning for text in sequences):
        return usage
    details = CompletionTokensDetails(sum(text.num_reasoning_tokens for text in sequences))
    return msgspec.structs.replace(usage, completion_tokens_details=details)


def event_of(body: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % msgspec.json.encode(body)


def failure_events(error: Exception) -> bytes:
    """An OpenAI error body as an event, and the end of the stream."""
    return event_of(error_body(error)) + DONE
