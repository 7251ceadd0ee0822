"""One sequence's way from engine outputs to text: detokenizer, stop strings, what counts.

The same code serves streams and whole answers, so the joined stream is the whole text.

Invariants: no part of a character and no part of a stop string is released; tokens beyond the one that
completed a stop string are neither shown nor counted; the last delta, and no other, has a finish reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.api.schemas.generation import GenerationRequest
from app.api.translate import PreparedSequence
from app.core.errors import EngineFailed, EngineUnavailable
from app.core.types import EngineOutput, FinishReason, TokenLogprobs
from app.text.detokenizer import Detokenizer
from app.text.stop import StopMatcher
from app.text.tokenizer import Tokenizer


class SequenceAborted(EngineUnavailable):
    """The server ended the sequence because it stops."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step added to a choice."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class SequenceText:
    """Text state of one sequence. Feed it every output of the engine, in order, until a delta is the last."""

    def __init__(
        self,
        sequence: PreparedSequence,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.prepared = sequence
        params = sequence.engine_request.params
        self._include_stop = bool(request.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._detokenizer = Detokenizer(
            tokenizer, request.skip_special_tokens is not False, after=sequence.prompt.token_ids
        )
        stops = request.stop_strings
        self._matcher = StopMatcher(stops, self._include_stop) if stops else None
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of prompt positions 1 and up; complete with the first delta."""
        self.num_output_tokens = 0
        self.num_cached_tokens = 0

    def feed(self, output: EngineOutput) -> Delta | None:
        """The next delta, or None where the step brought nothing to show (a prefill chunk).

        Raises EngineFailed or SequenceAborted where the engine gave the sequence up.
        """
        if output.prompt_logprobs:
            self.prompt_logprobs.extend(output.prompt_logprobs)
        reason = output.finish_reason
        if reason is None and not output.token_ids:
            return None
        if reason is FinishReason.ERROR:
            raise EngineFailed(output.error or "The engine failed this request.")
        if reason is FinishReason.ABORT:
            raise SequenceAborted("The server is stopping and ended this request.")
        self.num_cached_tokens = output.num_cached_tokens
        if self._matcher is None:
            text, count, matched = self._push_plain(output), len(output.token_ids), None
        else:
            text, count, matched = self._push_matching(output, self._matcher)
        self.num_output_tokens += count
        if matched is not None:
            return Delta(text, output.token_ids[:count], output.logprobs[:count], FinishReason.STOP, matched)
        return Delta(text, output.token_ids, output.logprobs, reason, output.stop_token_id)

    def _shown_tokens(self, output: EngineOutput) -> tuple[int, ...]:
        """Without the token that ended the sequence: it counts, but is no text. A grammar's last token is text."""
        token_ids = output.token_ids
        if output.finish_reason is not FinishReason.STOP or self._include_stop or not token_ids:
            return token_ids
        is_end = output.stop_token_id is not None or token_ids[-1] in self._eos_token_ids
        return token_ids[:-1] if is_end else token_ids

    def _push_plain(self, output: EngineOutput) -> str:
        text = self._detokenizer.push(self._shown_tokens(output))
        return text if output.finish_reason is None else text + self._detokenizer.finish()

    def _push_matching(self, output: EngineOutput, matcher: StopMatcher) -> tuple[str, int, str | None]:
        """Text, tokens accepted, stop string that ended the sequence. Token by token: only some may count."""
        shown = self._shown_tokens(output)
        parts: list[str] = []
        for count, token_id in enumerate(shown, start=1):
            piece = self._detokenizer.push((token_id,))
            if self.num_output_tokens + count <= self._min_tokens:
                # No stop string ends before min_tokens; one that begins before it may end behind it.
                parts.append(matcher.pass_over(piece))
                continue
            step = matcher.push(piece)
            parts.append(step.text)
            if step.matched is not None:
                return "".join(parts), count, step.matched
        if output.finish_reason is None:
            return "".join(parts), len(output.token_ids), None
        last = matcher.push(self._detokenizer.finish())
        parts += (last.text, "" if last.matched is not None else matcher.finish())
        return "".join(parts), len(output.token_ids), last.matched
