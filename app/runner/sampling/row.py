"""The sampling state of one row: what its parameters and its own token ids so far imply.

Built from a `RowStart`, so preemption and hand-over need no copy of it: the same ids give the same state.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.core.plan import RowStart
from app.core.types import SamplingParams, TokenLogprobs
from app.runner.sampling.changes import NO_CHANGES, LogitChanges
from app.runner.sampling.draw import draw, is_greedy
from app.runner.sampling.errors import NoTokenLeft, RowError
from app.runner.sampling.logprobs import token_logprobs
from app.runner.sampling.masks import NO_IDS, RowMasks, allowed_by
from app.runner.sampling.penalties import TokenCounts

_NO_COUNTS: NDArray[np.float32] = np.empty(0, dtype=np.float32)


class RowSampler:
    """Draws the tokens of one row and remembers them, as far as its parameters ask.

    `sample_row` is all that a CPU tier calls. A tier that draws on a device reads `changes()` and
    `params`, draws, asks `check`, and reports each token to `observe`.
    """

    def __init__(self, start: RowStart, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.params: SamplingParams = start.params
        self.num_prompt_tokens = len(start.prompt_token_ids)
        self._vocab_size = vocab_size
        ends = [token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size]
        self._masks = RowMasks(start.params, eos_token_ids=ends)
        self._output_token_ids = list(start.output_token_ids)
        params = start.params
        self._repeats = params.repetition_penalty != 1.0
        self._counts_output = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._seen = TokenCounts((*start.prompt_token_ids, *start.output_token_ids) if self._repeats else ())
        self._output = TokenCounts(start.output_token_ids if self._counts_output else ())
        is_free = not (params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens)
        self.is_unchanged = is_free and not (self._repeats or self._counts_output)
        """Every draw is from the raw logits."""
        self.refusal = _refusal(start, vocab_size)
        """Why no token of this row can be drawn, or None. Set at once, so that a step never fails for it."""

    def sample_row(
        self, logits: NDArray[np.float32], position: int, *, mask: NDArray[np.int32] | None = None
    ) -> tuple[int, TokenLogprobs | None]:
        """Draw the token for `position` from raw logits (vocab_size,), which are not written, and observe it.

        `position` counts from the start of the prompt, `mask` is what the row's grammar allows there (see
        `app.runner.base.Bitmask`). Raises RowError: logits not finite, nothing left to draw, or ids outside
        the vocabulary in the parameters.
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits have shape {logits.shape}; give ({self._vocab_size},)")
        changed = logits if self.is_unchanged else self.changes().apply(logits)
        if mask is None:
            self.check(float(logits.max()), float(changed.max()))
            token_id = draw(changed, self.params, position)
        else:
            token_id = self._draw_allowed(logits, changed, mask, position)
        self.observe(token_id)
        if self.params.num_logprobs is None:
            return token_id, None
        return token_id, token_logprobs(logits, token_id, self.params.num_logprobs)

    def _draw_allowed(
        self, logits: NDArray[np.float32], changed: NDArray[np.float32], mask: NDArray[np.int32], position: int
    ) -> int:
        """Draw as if all other tokens were -inf, without a look at them: they are most of the vocabulary."""
        best = int(changed.argmax())
        if is_greedy(self.params) and mask[best // 32] >> (best % 32) & 1:
            self.check(float(logits.max()), float(changed[best]))
            return best
        ids = np.flatnonzero(allowed_by(mask, self._vocab_size))
        allowed = changed[ids]
        self.check(float(logits.max()), float(allowed.max(initial=-np.inf)))
        return int(ids[draw(allowed, self.params, position)])

    def check(self, largest_raw: float, largest_changed: float) -> None:
        """Raise RowError where no token can be drawn, judging by the largest raw and changed logit (NaN wins)."""
        if self.refusal is not None:
            raise RowError(self.refusal)
        if not math.isfinite(largest_raw):
            raise RowError(f"the model's logits are not finite (largest {largest_raw}); the sequence cannot go on")
        if not math.isfinite(largest_changed):
            raise NoTokenLeft(
                "allowed_token_ids, bad_words, logit_bias, min_tokens and the grammar together leave no token to draw"
            )

    def changes(self) -> LogitChanges:
        """What happens to the logits of the next token, before temperature."""
        if self.refusal is not None:
            return NO_CHANGES
        params = self.params
        return LogitChanges(
            repeated_ids=self._seen.ids if self._repeats else NO_IDS,
            repetition_penalty=params.repetition_penalty,
            output_ids=self._output.ids if self._counts_output else NO_IDS,
            output_counts=self._output.counts if self._counts_output else _NO_COUNTS,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            bias_ids=self._masks.bias_ids,
            bias_values=self._masks.bias_values,
            allowed_ids=self._masks.allowed_ids,
            banned_ids=self._masks.banned_ids(self._output_token_ids),
        )

    def observe(self, token_id: int) -> None:
        """Count `token_id` as the row's next output token."""
        self._output_token_ids.append(token_id)
        if self._repeats:
            self._seen.add(token_id)
        if self._counts_output:
            self._output.add(token_id)


def _refusal(start: RowStart, vocab_size: int) -> str | None:
    """The API process checks ids before it sends them; a journal of another model may still bring some."""
    params = start.params
    fields = {
        "prompt": start.prompt_token_ids,
        "output": start.output_token_ids,
        "logit_bias": [token_id for token_id, _ in params.logit_bias],
        "allowed_token_ids": params.allowed_token_ids,
        "stop_token_ids": params.stop_token_ids,
        "bad_words": [token_id for word in params.bad_words for token_id in word],
    }
    for name, token_ids in fields.items():
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            return f"{name} holds a token id outside the vocabulary of {vocab_size} tokens"
    return None
