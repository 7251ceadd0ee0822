"""Metrics: buckets, counters over generations, sequences counted once."""

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from app.core.types import FinishReason
from app.observability.engine_gauges import EngineSnapshot
from app.observability.histogram import Histogram
from app.observability.metrics import Metrics
from app.observability.sequence_meter import SequenceMeter
from tests.engine_facts import LIMITS, STEP


def value(metrics: Metrics, stem: str, **labels: str) -> float | None:
    base = {"model_name": "m", "engine": "0"}
    return metrics.registry.get_sample_value(metrics.name(stem), base | labels)


def test_histogram_buckets_are_cumulative_with_inclusive_bounds() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("h", "help", bounds=(1.0, 2.5), labels={"a": "b"})
    registry.register(histogram)
    for one in (0.5, 1.0, 1.5, 2.5, 99.0):
        histogram.observe(one)
    histogram.observe(2.0, 3)
    read = {bound: registry.get_sample_value("h_bucket", {"a": "b", "le": bound}) for bound in ("1.0", "2.5", "+Inf")}
    assert read == {"1.0": 2, "2.5": 7, "+Inf": 8}
    assert registry.get_sample_value("h_count", {"a": "b"}) == 8 == histogram.count
    assert registry.get_sample_value("h_sum", {"a": "b"}) == pytest.approx(110.5)


def test_counters_go_on_when_an_engine_is_replaced() -> None:
    metrics = Metrics(model_name="m")
    metrics.observe_step(1, STEP)
    metrics.observe_step(1, STEP)  # the same step again
    assert value(metrics, "num_preemptions_total") == 2
    metrics.observe_step(1, msgspec.structs.replace(STEP, step_id=2, total_preemptions=5))
    metrics.observe_step(2, msgspec.structs.replace(STEP, step_id=2, total_preemptions=1, total_prefix_hit_tokens=0))
    assert value(metrics, "num_preemptions_total") == 6
    assert value(metrics, "prefix_cache_queries_total") == 200
    assert value(metrics, "prefix_cache_hits_total") == 40
    assert metrics.step_seconds.count == metrics.iteration_tokens.count == 3


def test_gauges_follow_the_journal() -> None:
    metrics = Metrics(model_name="m")
    snapshot = [EngineSnapshot("ready", 3, 5, STEP, LIMITS)]
    metrics.watch_engine(lambda: snapshot[0])
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_perc") == 0.25
    assert value(metrics, "engine_restarts_total") == 2 and value(metrics, "engine_ready") == 1
    info = {"block_size": "16", "num_gpu_blocks": "64", "kv_cache_size_tokens": "1024", "cache_dtype": "float32"}
    assert value(metrics, "cache_config_info", **info) == 1
    # All were aborted, and the engine makes no further step that would say so.
    snapshot[0] = EngineSnapshot("restarting", 3, 0, STEP, None)
    for stem in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "engine_ready"):
        assert value(metrics, stem) == 0


def test_two_engines_that_take_turns_are_counted_apart() -> None:
    metrics = Metrics(model_name="m")
    for step_id in (1, 2, 3):
        for generation in (1, 2):
            metrics.observe_step(generation, msgspec.structs.replace(STEP, step_id=step_id))
    assert value(metrics, "num_preemptions_total") == 4
    for generation in range(3, 20):
        metrics.observe_step(generation, STEP)
    assert len(metrics._last_steps) < 10


def test_an_engine_that_leaves_has_gauges_of_its_own() -> None:
    metrics = Metrics(model_name="m")
    metrics.watch_engine(lambda: EngineSnapshot("ready", 2, 0, None, LIMITS))
    metrics.watch_leaving(lambda: EngineSnapshot("draining", 1, 5, STEP, LIMITS))
    assert value(metrics, "num_requests_running") == 0 and value(metrics, "engine_generation") == 2
    assert value(metrics, "num_requests_running", engine="leaving") == 3
    assert value(metrics, "engine_ready", engine="leaving") == 0 and value(metrics, "engine_restarts_total") == 1
    metrics.watch_leaving(None)
    assert (
        metrics.registry.get_sample_value("headwater_num_requests_running", {"model_name": "m", "engine": "leaving"})
        is None
    )
    metrics.watch_engine(lambda: EngineSnapshot("ready", 3, 4, STEP, LIMITS))
    assert value(metrics, "num_requests_running") == 3


def test_a_scrape_counts_the_last_step() -> None:
    metrics = Metrics(model_name="m", prefix="vllm:")
    metrics.watch_engine(lambda: EngineSnapshot("ready", 1, 1, STEP, LIMITS))
    body, content_type = metrics.render("text/plain")
    assert content_type.startswith("text/plain")
    families = {family.name for family in text_string_to_metric_families(body.decode())}
    assert {"vllm:num_requests_running", "vllm:iteration_tokens_total", "vllm:num_preemptions"} <= families
    assert value(metrics, "num_preemptions_total") == 2


def test_names_are_given_once() -> None:
    body, _ = Metrics(model_name="m").render()
    names = [line.split()[2] for line in body.decode().splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_a_sequence_is_counted_once() -> None:
    metrics = Metrics(model_name="m")
    meter = SequenceMeter(metrics, arrived=10.0, num_prompt_tokens=7)
    before = meter.ttft
    meter.queue_seconds = 0.2
    meter.advance(1, now=10.5, num_cached_tokens=4)
    meter.advance(2, now=10.7, num_cached_tokens=4)
    meter.finish(FinishReason.LENGTH, now=10.8)
    meter.finish(FinishReason.ABORT, now=99.0)
    assert before is None and meter.ttft == 0.5 and meter.finish_reason is FinishReason.LENGTH
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    assert value(metrics, "request_success_total", finished_reason="abort") == 0
    assert value(metrics, "prompt_tokens_total") == 7 and value(metrics, "prompt_tokens_cached_total") == 4
    assert value(metrics, "generation_tokens_total") == 3
    assert metrics.inter_token_latency.count == 2  # one for each token after the first
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "request_queue_time_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "request_prefill_time_seconds_sum") == pytest.approx(0.3)
    assert value(metrics, "request_decode_time_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "request_time_per_output_token_seconds_sum") == pytest.approx(0.1)
    assert value(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(0.8)


def test_a_sequence_that_never_began_has_an_end_and_no_times() -> None:
    metrics = Metrics(model_name="m")
    SequenceMeter(metrics, arrived=0.0, num_prompt_tokens=7).finish(FinishReason.ABORT, now=1.0)
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "prompt_tokens_total") == 0 and metrics.time_to_first_token.count == 0


def test_refusals_and_responses() -> None:
    metrics = Metrics(model_name="m")
    metrics.count_rejection("max_live_sequences")
    metrics.count_response(handler="/x", method="GET", status=None)
    read = metrics.registry.get_sample_value
    assert read("headwater_admission_rejections_total", {"model_name": "m", "reason": "max_live_sequences"}) == 1
    labels = {"handler": "/x", "method": "GET", "status": "disconnected"}
    assert read("headwater_http_responses_total", labels) == 1
