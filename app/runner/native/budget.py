"""How many tokens a step may have: measured once at load, constant afterwards.

Tokens do not depend on it (rows are independent), so the measurement may be as noisy as the machine.
"""

import time
from collections.abc import Callable

from app.runner.native.model import BLOCK_SIZE

DEFAULT_TARGET_MS = 100.0
_MOST_TOKENS = 2048
_ROUNDS = 2


def tokens_for_target(run_step: Callable[[int], None], *, target_ms: float, most_tokens: int) -> int:
    """Whole blocks of tokens that take about `target_ms`, one block at least.

    `run_step(n)` computes a prefill step of n tokens; the best of a few runs counts.
    """
    probe = min(2 * BLOCK_SIZE, most_tokens)
    run_step(probe)
    seconds = min(_timed(run_step, probe) for _ in range(_ROUNDS))
    tokens = target_ms / 1000.0 * probe / seconds
    blocks = int(min(tokens, _MOST_TOKENS, max(most_tokens, BLOCK_SIZE))) // BLOCK_SIZE
    return max(1, blocks) * BLOCK_SIZE


def _timed(run_step: Callable[[int], None], num_tokens: int) -> float:
    begin = time.perf_counter()
    run_step(num_tokens)
    return time.perf_counter() - begin
