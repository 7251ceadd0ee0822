"""When a sequence ends by what it has generated: end-of-text ids, stop ids, length. Pure functions."""

from typing import NamedTuple

from app.core.types import EngineRequest, FinishReason, SamplingParams


class Finish(NamedTuple):
    """Why a sequence ended."""

    reason: FinishReason
    stop_token_id: int | None = None
    """The id of `stop_token_ids` that ended it; None where an end-of-text id or the length did."""


class FinishRules:
    """The conditions of one sequence, worked out once."""

    __slots__ = ("_ending_ids", "_eos_ids", "_first_end_len", "max_len")

    def __init__(self, request: EngineRequest, *, eos_token_ids: tuple[int, ...], max_sequence_len: int) -> None:
        params = request.params
        num_prompt_tokens = len(request.prompt_token_ids)
        self._eos_ids = _honoured_eos(params, eos_token_ids)
        self._ending_ids = self._eos_ids | frozenset(params.stop_token_ids)
        # The sampler cannot draw an ending id as one of the first min_tokens output tokens.
        self._first_end_len = num_prompt_tokens + params.min_tokens + 1
        self.max_len = min(num_prompt_tokens + params.max_tokens, max_sequence_len)
        """Prompt and output tokens together, at which the sequence ends with `length`."""

    def check(self, token_ids: list[int]) -> Finish | None:
        """Whether the last of these tokens, which must be an output token, ends the sequence."""
        last = token_ids[-1]
        if last in self._ending_ids and len(token_ids) >= self._first_end_len:
            return Finish(FinishReason.STOP, None if last in self._eos_ids else last)
        if len(token_ids) >= self.max_len:
            return Finish(FinishReason.LENGTH)
        return None


def _honoured_eos(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
    return frozenset() if params.ignore_eos else frozenset(eos_token_ids)
