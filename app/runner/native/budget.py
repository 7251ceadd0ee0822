"""How many tokens a step may have: measured once at load, constant afterwards.

Tokens do not depend on it (rows are independent), so it need not be exact. What is measured is one
thread's own CPU time: while an engine loads, the API process starts on another core, and a share of the
machine at that moment says nothing about the server's life.
"""

import time
from collections.abc import Callable

from app.runner.native.model import BLOCK_SIZE

DEFAULT_TARGET_MS = 250.0
_MOST_TOKENS = 2048
_ROUNDS = 2
_NEXT_THREAD = 0.8
"""What each further thread adds to the speed of one."""


def tokens_for_target(run_step: Callable[[int], None], *, target_ms: float, most_tokens: int, num_threads: int) -> int:
    """Whole blocks of tokens that `num_threads` compute in about `target_ms`, one block at least.

    `run_step(n)` computes a prefill step of n tokens on the calling thread; the best of a few runs counts.
    """
    run_step(BLOCK_SIZE)
    seconds = max(min(_timed(run_step) for _ in range(_ROUNDS)), 1e-9)
    speedup = 1.0 + _NEXT_THREAD * (num_threads - 1)
    tokens = target_ms / 1000.0 * speedup * BLOCK_SIZE / seconds
    blocks = int(min(tokens, _MOST_TOKENS, max(most_tokens, BLOCK_SIZE))) // BLOCK_SIZE
    return max(1, blocks) * BLOCK_SIZE


def _timed(run_step: Callable[[int], None]) -> float:
    begin = time.thread_time()
    run_step(BLOCK_SIZE)
    return time.thread_time() - begin
