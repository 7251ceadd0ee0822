"""The shapes of choices: log-probabilities, echo, token ids, usage.

Log-probabilities follow vLLM: `top_logprobs` holds the token itself first, then the most likely ones;
what is impossible (-inf) is -9999.0, since JSON has no infinity. Equal tokens have equal floats.
"""

from collections.abc import Iterable, Sequence

import msgspec

from app.api.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)
from app.api.sequence_text import Delta, SequenceText
from app.api.translate import PreparedSequence
from app.core.types import TokenLogprobs
from app.text.tokenizer import Tokenizer

_LOWEST = -9999.0


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

    def chars(self, token_id: int) -> tuple[int, int]:
        """Characters that begin in the token, and 1 if its first byte goes on with an earlier character."""
        data = self._tokenizer.token_bytes(token_id)
        begun = sum(byte & 0xC0 != 0x80 for byte in data)
        return begun, int(bool(data) and data[0] & 0xC0 == 0x80)


class ChoiceBuilder:
    """Makes one sequence's choices, one for each delta, whether they are streamed or joined."""

    def __init__(
        self,
        sequence: PreparedSequence,
        request: CompletionRequest,
        *,
        text: SequenceText,
        tokenizer: Tokenizer,
        spelling: TokenSpelling,
    ) -> None:
        self._sequence = sequence
        self._request = request
        self._text = text
        self._tokenizer = tokenizer
        self._spelling = spelling
        self._num_chars = 0
        self._is_first = True
        self.is_plain = request.logprobs is None and not request.return_token_ids and not request.echo
        """Whether a choice between the first and the last is text and nothing else."""

    def build(self, delta: Delta) -> CompletionChoice:
        """The delta as a choice; the first one carries the echo and all that belongs to the prompt."""
        choice = CompletionChoice(
            index=self._sequence.index,
            text=delta.text,
            finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason=delta.stop_reason,
        )
        if self._request.logprobs is not None:
            choice.logprobs = CompletionLogprobs([], [], [], [])
        if self._request.return_token_ids:
            choice.token_ids = list(delta.token_ids)
        if self._is_first:
            self._is_first = False
            self._add_prompt(choice)
        if choice.logprobs is not None:
            self._add_logprobs(choice.logprobs, delta.token_ids, delta.logprobs)
        return choice

    def _add_prompt(self, choice: CompletionChoice) -> None:
        prompt, request = self._sequence.prompt, self._request
        if request.echo:
            shown = prompt.text
            if shown is None:
                shown = self._tokenizer.decode(prompt.token_ids, request.skip_special_tokens is not False)
            choice.text = shown + choice.text
            if choice.logprobs is not None:
                self._add_logprobs(choice.logprobs, prompt.token_ids, (None, *self._text.prompt_logprobs))
        if request.return_token_ids:
            choice.prompt_token_ids = prompt.token_ids
        if request.prompt_logprobs is not None:
            choice.prompt_logprobs = self._prompt_logprobs(request.prompt_logprobs)

    def _add_logprobs(
        self,
        logprobs: CompletionLogprobs,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
    ) -> None:
        count = self._request.logprobs or 0
        for token_id, entry in zip(token_ids, entries, strict=True):
            begun, inside = self._spelling.chars(token_id)
            logprobs.tokens.append(self._spelling.text(token_id))
            logprobs.text_offset.append(max(0, self._num_chars - inside))
            self._num_chars += begun
            if entry is None:
                logprobs.token_logprobs.append(None)
                logprobs.top_logprobs.append(None)
                continue
            own = max(entry.logprob, _LOWEST)
            top = {self._spelling.text(token_id): own}
            for other, logprob in zip(entry.top_token_ids[:count], entry.top_logprobs, strict=False):
                top.setdefault(self._spelling.text(other), max(logprob, _LOWEST))
            logprobs.token_logprobs.append(own)
            logprobs.top_logprobs.append(top)

    def _prompt_logprobs(self, count: int) -> PromptLogprobs:
        result: PromptLogprobs = [None]
        for token_id, entry in zip(self._sequence.prompt.token_ids[1:], self._text.prompt_logprobs, strict=True):
            candidates = [(token_id, entry.logprob, entry.rank)]
            candidates += [
                (other, logprob, rank)
                for rank, (other, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1)
            ][:count]
            position: dict[str, PromptLogprob] = {}
            for other, logprob, rank in candidates:
                shown = self._tokenizer.token_text(other)
                position.setdefault(str(other), PromptLogprob(max(logprob, _LOWEST), rank, shown))
            result.append(position)
        return result


def join_choices(choices: Iterable[CompletionChoice]) -> CompletionChoice:
    """The whole choice from its deltas, of which there is at least one."""
    parts = list(choices)
    first, last = parts[0], parts[-1]
    first.text = "".join([part.text for part in parts])
    first.finish_reason, first.stop_reason = last.finish_reason, last.stop_reason
    for part in parts[1:]:
        if first.logprobs is not None and part.logprobs is not None:
            first.logprobs.tokens += part.logprobs.tokens
            first.logprobs.token_logprobs += part.logprobs.token_logprobs
            first.logprobs.top_logprobs += part.logprobs.top_logprobs
            first.logprobs.text_offset += part.logprobs.text_offset
        if first.token_ids is not msgspec.UNSET and part.token_ids is not msgspec.UNSET:
            first.token_ids += part.token_ids
    return first


def usage_of(sequences: Sequence[tuple[PreparedSequence, SequenceText]]) -> Usage:
    """Counts of these sequences: each prompt once, with what none of its samples had to compute as cached."""
    prompt_tokens: dict[int, int] = {}
    cached_tokens: dict[int, int] = {}
    for sequence, text in sequences:
        key = sequence.prompt_index
        prompt_tokens[key] = len(sequence.prompt.token_ids)
        cached_tokens[key] = min(cached_tokens.get(key, text.num_cached_tokens), text.num_cached_tokens)
    num_prompt = sum(prompt_tokens.values())
    num_output = sum(text.num_output_tokens for _, text in sequences)
    return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(sum(cached_tokens.values())))
