"""The journal: for each live sequence its request and every token received. All that a hand-over needs.

Invariants: a token is in the journal before its consumer can see it, once, in order; a sequence leaves
the journal when its finish was received or its consumer went away.
"""

import asyncio
from collections.abc import Iterator

import msgspec

from app.core.errors import EngineFailed
from app.core.types import EngineOutput, EngineRequest, FinishReason
from app.ipc.progress import request_key


class LiveSequence:
    """One admitted sequence, and the outputs that its consumer has not taken yet.

    A slow consumer gets what gathered in one output, so it holds at most its own max_tokens.
    """

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.key = request_key(request.request_id)
        self.received: list[int] = list(request.output_token_ids)
        self.is_on_probation = False
        """An engine died of itself in a step that computed this sequence, and no token has been received since."""
        self.is_finished = False
        """A finish was received, or its consumer is gone: nothing more is expected."""
        self.was_sent = False
        """An engine has had it."""
        self._is_handed_over = False
        self._num_prompt_logprobs = 0
        self._num_to_skip = 0
        self._num_cached_tokens: int | None = None
        self._outputs: list[EngineOutput] = []
        self._failure: EngineFailed | None = None
        self._wakeup = asyncio.Event()

    def hand_over(self) -> EngineRequest:
        """The request for the next engine: it goes on after the last token received."""
        self._is_handed_over = True
        if self.was_sent and self._num_cached_tokens is None:
            self._num_cached_tokens = 0  # the next engine may find what the last one computed for this very sequence
        self.was_sent = True
        if not self.received:
            self._num_to_skip = self._num_prompt_logprobs
            return msgspec.structs.replace(self.request, is_on_probation=self.is_on_probation)
        params = self.request.params
        if params.num_prompt_logprobs is not None:  # all were received before the first token
            params = msgspec.structs.replace(params, num_prompt_logprobs=None)
        return msgspec.structs.replace(
            self.request,
            params=params,
            output_token_ids=tuple(self.received),
            is_on_probation=self.is_on_probation,
        )

    def receive(self, output: EngineOutput) -> None:
        """Enter an output of the engine."""
        if self.is_finished:
            return
        output = self._as_one_stream(output)
        if output.token_ids or output.finish_reason is not None:
            self.received += output.token_ids
            self.is_on_probation = False
        self.is_finished = output.finish_reason is not None
        self._outputs.append(output)
        self._wakeup.set()

    def end(self, reason: FinishReason) -> None:
        """Finish without an engine."""
        self.receive(EngineOutput(self.request.request_id, finish_reason=reason))

    def fail(self, message: str) -> None:
        """End with EngineFailed, after the outputs received before."""
        if not self.is_finished:
            self.is_finished = True
            self._failure = EngineFailed(message)
            self._wakeup.set()

    async def next_output(self) -> EngineOutput:
        """All that was received since the last call, as one output. Raises EngineFailed."""
        while not self._outputs:
            if self._failure is not None:
                raise self._failure
            self._wakeup.clear()
            await self._wakeup.wait()
        outputs, self._outputs = self._outputs, []
        return outputs[0] if len(outputs) == 1 else _merge(outputs)

    def _as_one_stream(self, output: EngineOutput) -> EngineOutput:
        """Hide that the outputs come from several engines."""
        if self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        elif output.num_cached_tokens != self._num_cached_tokens:
            output = msgspec.structs.replace(output, num_cached_tokens=self._num_cached_tokens)
        if output.prompt_logprobs:
            num_skipped = min(self._num_to_skip, len(output.prompt_logprobs))
            self._num_to_skip -= num_skipped
            if num_skipped:
                output = msgspec.structs.replace(output, prompt_logprobs=output.prompt_logprobs[num_skipped:])
            self._num_prompt_logprobs += len(output.prompt_logprobs)
        if self._is_handed_over:
            self._is_handed_over = False
            output = msgspec.structs.replace(output, was_handed_over=True)
        return output


class Journal:
    """The live sequences, oldest first."""

    def __init__(self) -> None:
        self._sequences: dict[str, LiveSequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[LiveSequence]:
        return iter(list(self._sequences.values()))

    def admit(self, request: EngineRequest) -> LiveSequence:
        """Enter a new sequence. Raises ValueError where its id is in use."""
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is in use by a live sequence: make a new one")
        sequence = self._sequences[request.request_id] = LiveSequence(request)
        return sequence

    def receive(self, output: EngineOutput) -> LiveSequence | None:
        """Enter an output; None where its sequence is gone."""
        sequence = self._sequences.get(output.request_id)
        if sequence is None:
            return None
        sequence.receive(output)
        if sequence.is_finished:
            del self._sequences[output.request_id]
        return sequence

    def remove(self, sequence: LiveSequence) -> bool:
        """Take a sequence out; False where it is not in here any more."""
        if self._sequences.get(sequence.request.request_id) is not sequence:
            return False
        del self._sequences[sequence.request.request_id]
        sequence.is_finished = True
        return True

    def pop_all(self) -> list[LiveSequence]:
        """Empty the journal."""
        sequences = list(self._sequences.values())
        self._sequences.clear()
        return sequences


def _merge(outputs: list[EngineOutput]) -> EngineOutput:
    last = outputs[-1]
    return msgspec.structs.replace(
        last,
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
        was_handed_over=any(output.was_handed_over for output in outputs),
        queue_seconds=next((output.queue_seconds for output in outputs if output.queue_seconds is not None), None),
    )
