"""Log-probabilities of the raw float32 logits.

The chosen token's and the most likely tokens' are the same array minus the same number, rounded once
to float32: equal tokens have equal floats. They are finite (JSON has no infinity): -9999 at least.
"""

import numpy as np
from numpy.typing import NDArray

from app.core.types import TokenLogprobs
from app.runner.sampling.errors import RowError
from app.runner.sampling.filters import largest, ordered

LOWEST_LOGPROB = -9999.0


def log_sum_exp(logits: NDArray[np.float32]) -> float:
    """log(sum(exp(logits))) of one row, (vocab_size,): exp in float32, the sum in float64."""
    largest_logit = logits.max()
    mass = np.exp(logits - largest_logit).sum(dtype=np.float64)
    return float(largest_logit) + float(np.log(mass))


def token_logprobs(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
    """Logprob and rank of `token_id` and the `num_top` most likely tokens, from raw logits (vocab_size,)."""
    top_ids = ordered(logits, largest(logits, num_top)) if num_top else np.empty(0, dtype=np.int64)
    ids = np.concatenate([[token_id], top_ids])
    values = (logits[ids].astype(np.float64) - log_sum_exp(logits)).astype(np.float32)
    chosen, *top = np.maximum(values, np.float32(LOWEST_LOGPROB)).tolist()
    return TokenLogprobs(
        logprob=chosen,
        rank=1 + int(np.count_nonzero(logits > logits[token_id])),
        top_token_ids=tuple(top_ids.tolist()),
        top_logprobs=tuple(top),
    )


def score_prompt(
    logits: NDArray[np.float32], next_token_ids: tuple[int, ...] | list[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """One value for each row of logits (num_positions, vocab_size): how it scores the token that follows.

    Raises RowError where a row's logits are not finite.
    """
    if len(logits) != len(next_token_ids):
        raise ValueError(f"{len(logits)} rows of logits for {len(next_token_ids)} tokens; give one row a token")
    scored = []
    for row, token_id in zip(logits, next_token_ids, strict=True):
        if not np.isfinite(row.max()):  # NaN wins in numpy's max
            raise RowError("the model's logits are not finite; the prompt cannot be scored")
        scored.append(token_logprobs(row, token_id, num_top))
    return tuple(scored)
