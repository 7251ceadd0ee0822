"""`GET /engine`: what the live view polls. Also for people: `curl .../engine` says how the engine is."""

import time

from fastapi import APIRouter, Request, Response

from app.api.deps import ServerContext
from app.api.openapi import json_reply
from app.api.respond import JsonResponse
from app.api.schemas.engine import EngineView, HandOverView, KVView, Latency, StepRow
from app.core.errors import InvalidRequest
from app.core.types import EngineLimits, StepStats
from app.observability.activity import Percentiles, Step


def routes(context: ServerContext) -> APIRouter:
    """The live view's route."""
    router = APIRouter(tags=["server"])

    @router.get("/engine", responses=json_reply(EngineView, (InvalidRequest,)), response_class=Response)
    async def engine(request: Request) -> Response:
        """The engine now, and its steps after number `after` (0: all that are kept)."""
        return JsonResponse(_view(context, _number(request.query_params.get("after", "0"))))

    return router


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise InvalidRequest(f"`after` must be the number of a step, got `{text[:32]}`.", param="after")
    return int(text)


def _view(context: ServerContext, after: int) -> EngineView:
    now = time.monotonic()
    status, limits, activity = context.engine.status, context.engine.limits, context.metrics.activity
    step = status.last_step
    running = 0 if step is None else min(step.num_running, status.num_live_requests)
    decoded, prefilled = activity.rates(now)
    return EngineView(
        now=now,
        state=status.state.value,
        detail=status.detail,
        generation=status.generation,
        engine_pid=status.engine_pid,
        num_running=running,
        num_waiting=status.num_live_requests - running,
        decode_tokens_per_second=decoded,
        prefill_tokens_per_second=prefilled,
        time_to_first_token=_latency(activity.time_to_first_token(now)),
        inter_token_latency=_latency(activity.inter_token_latency(now)),
        kv=None if limits is None else _kv(limits, step, is_idle=status.num_live_requests == 0),
        prefix_hit_rate=_hit_rate(step),
        num_preemptions=0 if step is None else step.total_preemptions,
        max_num_batched_tokens=None if limits is None else limits.max_num_batched_tokens,
        last_step=activity.num_steps,
        steps=[_row(step) for step in activity.steps_after(after)],
        hand_overs=[HandOverView(*event) for event in activity.hand_overs],
    )


def _latency(values: Percentiles) -> Latency:
    return Latency(values.p50, values.p90, values.p99, values.num_observed)


def _kv(limits: EngineLimits, step: StepStats | None, *, is_idle: bool) -> KVView:
    # The last step's figures are from before the last sequence left.
    used = 0 if step is None or is_idle else step.num_kv_blocks_used
    shared = 0 if step is None or is_idle else step.num_kv_blocks_shared
    cached = 0 if step is None else step.num_kv_blocks_cached
    return KVView(limits.num_kv_blocks, limits.block_size, used, shared, cached)


def _hit_rate(step: StepStats | None) -> float | None:
    if step is None or not step.total_prefix_query_tokens:
        return None
    return step.total_prefix_hit_tokens / step.total_prefix_query_tokens


def _row(step: Step) -> StepRow:
    stats = step.stats
    return (
        step.number,
        step.at,
        step.generation,
        stats.step_seconds,
        stats.num_prefill_tokens,
        stats.num_decode_tokens,
        step.num_cached_tokens,
        stats.num_running,
        stats.num_waiting,
        stats.num_kv_blocks_used,
        stats.num_kv_blocks_shared,
    )
