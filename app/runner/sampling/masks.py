"""logit_bias, allowed_token_ids, bad_words, min_tokens and a grammar's mask: which tokens are pushed or banned.

Everything but the last words of the output and the grammar's mask is fixed when a row starts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.core.types import SamplingParams

NO_IDS: NDArray[np.int64] = np.empty(0, dtype=np.int64)


class RowMasks:
    """The pushes and bans of one row's parameters. Immutable: asked with the output so far."""

    def __init__(self, params: SamplingParams, *, eos_token_ids: Sequence[int]) -> None:
        self.bias_ids = np.array([token_id for token_id, _ in params.logit_bias], dtype=np.int64)
        self.bias_values = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self.allowed_ids = np.array(sorted(set(params.allowed_token_ids)), dtype=np.int64)
        """Empty: every token is allowed."""
        self._min_tokens = params.min_tokens
        self._end_ids = np.array(sorted({*eos_token_ids, *params.stop_token_ids}), dtype=np.int64)
        self._banned_ids = np.array([word[0] for word in params.bad_words if len(word) == 1], dtype=np.int64)
        self._bad_words = tuple(word for word in params.bad_words if len(word) > 1)

    def banned_ids(self, output_token_ids: Sequence[int]) -> NDArray[np.int64]:
        """Ids that may not follow this output: ends before min_tokens, last tokens of bad words."""
        completing = [
            word[-1]
            for word in self._bad_words
            if len(output_token_ids) >= len(word) - 1 and tuple(output_token_ids[1 - len(word) :]) == word[:-1]
        ]
        ends = self._end_ids if len(output_token_ids) < self._min_tokens else NO_IDS
        if not completing and not len(ends):
            return self._banned_ids
        return np.concatenate([self._banned_ids, ends, np.array(completing, dtype=np.int64)])


def keep_only(logits: NDArray[np.float32], allowed_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """A copy in which every id outside `allowed_ids` is -inf."""
    masked = np.full_like(logits, -np.inf)
    masked[allowed_ids] = logits[allowed_ids]
    return masked


def allowed_by(mask: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """(vocab_size,): which tokens a grammar's bitmask lets through. See `app.runner.base.Bitmask`."""
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
