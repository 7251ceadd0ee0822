"""One sequence's way from engine outputs to text: detokenizer, stop strings, what counts.

The same code serves streams and whole answers, so the joined stream is the whole text.

Invariants: no part of a character and no part of a stop string is released; tokens beyond the one that
completed a stop string are neither shown nor counted; the last delta, and no other, has a finish reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.api.reasoning import ReasoningPlan
from app.api.schemas.generation import GenerationRequest
from app.api.translate import PreparedSequence
from app.core.errors import EngineFailed, EngineUnavailable, InvalidRequest
from app.core.types import EngineOutput, FinishReason, TokenLogprobs
from app.text.detokenizer import Detokenizer
from app.text.reasoning import ReasoningStep
from app.text.stop import StopMatcher, StopStep
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
    reasoning: str = ""
    """What of it came before the answer, where the two are told apart."""


class SequenceText:
    """Text state of one sequence. Feed it every output of the engine, in order, until a delta is the last."""

    def __init__(
        self,
        sequence: PreparedSequence,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        reasoning: ReasoningPlan | None = None,
    ) -> None:
        """`reasoning` says how it is told from the answer; None: all is answer."""
        self.prepared = sequence
        params = sequence.engine_request.params
        self._include_stop = bool(request.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._detokenizer = Detokenizer(
            tokenizer, request.skip_special_tokens is not False, after=sequence.prompt.token_ids
        )
        stops = request.stop_strings
        self._reasoning = None if reasoning is None else reasoning.parser()
        self._hidden_tags: Mapping[int, str] = {} if reasoning is None else reasoning.hidden_tags
        self._matcher = StopMatcher(stops, self._include_stop) if stops else None
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of prompt positions 1 and up; complete with the first delta."""
        self.num_output_tokens = 0
        self.num_reasoning_tokens = 0
        """Output tokens up to the end of the reasoning, its tags included."""
        self.num_cached_tokens = 0
        self._is_cached_settled = False

    @property
    def splits_reasoning(self) -> bool:
        """Whether reasoning is told from the answer."""
        return self._reasoning is not None

    def settle_cached_tokens(self, count: int) -> None:
        """The client was told so much: what another engine says of its own cache changes no usage."""
        self.num_cached_tokens, self._is_cached_settled = count, True

    def feed(self, output: EngineOutput) -> Delta | None:
        """The next delta, or None where the step brought nothing to show (a prefill chunk).

        Raises EngineFailed, SequenceAborted, or InvalidRequest where the engine gave the sequence up.
        """
        if output.prompt_logprobs:
            self.prompt_logprobs.extend(output.prompt_logprobs)
        reason = output.finish_reason
        if reason is None and not output.token_ids:
            return None
        if reason is FinishReason.ERROR:
            if output.is_request_fault:
                why = output.error or "the output cannot go on"
                raise InvalidRequest(f"{why[:1].upper()}{why[1:]}.", code="output_impossible")
            raise EngineFailed(output.error or "The engine failed this request.")
        if reason is FinishReason.ABORT:
            raise SequenceAborted("The server is stopping and ended this request.")
        if not self._is_cached_settled:
            self.num_cached_tokens = output.num_cached_tokens
        if self._matcher is None and self._reasoning is None:
            self.num_output_tokens += len(output.token_ids)
            return Delta(self._push_plain(output), output.token_ids, output.logprobs, reason, output.stop_token_id)
        step, count, matched = self._push_each(output)
        self.num_output_tokens += count
        if matched is not None:
            return Delta(
                step.text, output.token_ids[:count], output.logprobs[:count], FinishReason.STOP, matched, step.reasoning
            )
        return Delta(step.text, output.token_ids, output.logprobs, reason, output.stop_token_id, step.reasoning)

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

    def _push_each(self, output: EngineOutput) -> tuple[ReasoningStep, int, str | None]:
        """What is released, tokens accepted, the stop string that ended the sequence.

        Token by token: only some may count, and each counts as reasoning or not.
        """
        parts: list[ReasoningStep] = []
        matched: str | None = None
        count = 0
        for count, token_id in enumerate(self._shown_tokens(output), start=1):
            text, matched = self._match(self._piece(token_id), self.num_output_tokens + count)
            parts.append(self._split(text, self.num_output_tokens + count))
            if matched is not None:
                break
        if matched is None:
            count = len(output.token_ids)
            if output.finish_reason is not None:
                text, matched = self._match_end()
                parts.append(self._split(text, self.num_output_tokens + len(output.token_ids)))
        if self._reasoning is not None and (matched is not None or output.finish_reason is not None):
            parts.append(self._reasoning.finish())
        reasoning, text = "".join([one.reasoning for one in parts]), "".join([one.text for one in parts])
        return ReasoningStep(reasoning, text), count, matched

    def _piece(self, token_id: int) -> str:
        return self._detokenizer.push((token_id,)) + self._hidden_tags.get(token_id, "")

    def _match(self, piece: str, num_tokens: int) -> StopStep:
        """What of the text of token number `num_tokens` is certain to stand before any stop string."""
        if self._matcher is None:
            return StopStep(piece, None)
        if num_tokens <= self._min_tokens:
            # No stop string ends before min_tokens; one that begins before it may end behind it.
            return StopStep(self._matcher.pass_over(piece), None)
        return self._matcher.push(piece)

    def _match_end(self) -> StopStep:
        """The same for all that is left."""
        rest = self._detokenizer.finish()
        if self._matcher is None:
            return StopStep(rest, None)
        last = self._matcher.push(rest)
        return last if last.matched is not None else StopStep(last.text + self._matcher.finish(), None)

    def _split(self, text: str, num_tokens: int) -> ReasoningStep:
        """The reasoning in a text that token number `num_tokens` brought."""
        parser = self._reasoning
        if parser is None:
            return ReasoningStep("", text)
        was_reasoning = parser.is_reasoning
        step = parser.push(text)
        if was_reasoning or parser.is_reasoning or step.reasoning:
            self.num_reasoning_tokens = num_tokens
        return step
