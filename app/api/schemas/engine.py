"""`GET /engine`: the engine as the live view shows it. Figures only: no prompt, no output, no request id."""

import msgspec

StepRow = tuple[int, float, int, float, int, int, int, int, int, int, int]
"""number, at, generation, seconds, prefill, decode, cached, running, waiting, blocks used, blocks shared."""


class Latency(msgspec.Struct, frozen=True):
    """Seconds over the last minute; null where nothing was observed."""

    p50: float | None
    p90: float | None
    p99: float | None
    count: int


class HandOverView(msgspec.Struct, frozen=True):
    """An engine was replaced."""

    at: float
    generation: int
    pause_seconds: float | None
    """Null where no sequence waited for it."""


class KVView(msgspec.Struct, frozen=True):
    """The KV cache, in blocks."""

    num_blocks: int
    block_size: int
    num_used: int
    num_shared: int
    num_cached: int


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the engine. Times (`now`, `at`) are seconds of one clock whose zero means nothing."""

    now: float
    state: str
    detail: str
    generation: int
    engine_pid: int | None
    num_running: int
    num_waiting: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    time_to_first_token: Latency
    inter_token_latency: Latency
    kv: KVView | None
    """Null before the first engine was ready."""
    prefix_hit_rate: float | None
    """Share of looked-up prompt tokens that the prefix cache held, over this engine's life."""
    num_preemptions: int
    max_num_batched_tokens: int | None
    last_step: int
    """Number of the latest step: pass it as `after` to hear of later ones only."""
    steps: list[StepRow]
    hand_overs: list[HandOverView]
