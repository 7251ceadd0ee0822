"""Every metric of the API process: each name once, here, in vLLM's stems, labels and types.

Invariants: counters never go back. What an engine counts over its own life (preemptions, prefix hits)
is added up over generations. Gauges follow the journal, not the last step, so that they return to 0
when the last sequence is gone, however it went. A *request* in a metric's name is one sequence, as in
vLLM: `n` samples of a prompt are n of them. The sum over `request_success_total` is the number of
sequences that were admitted and have ended.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import choose_encoder

from app.core.types import FinishReason, StepStats
from app.observability.activity import Activity
from app.observability.engine_gauges import EngineGauges, EngineReader
from app.observability.histogram import Histogram

TTFT_BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Seconds. vLLM's, with 2 ms added: a small model's first token takes a few."""
ITL_BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""Seconds. vLLM's begin at 10 ms; a small model's step takes 5."""
LATENCY_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_BOUNDS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
_NUM_GENERATIONS = 8
STEP_TOKEN_BOUNDS = (1.0, *(float(8 * 2**power) for power in range(12)))
SAMPLE_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0)


class Metrics:
    """The registry and all that is counted. One object a server; it belongs to the event loop's thread."""

    def __init__(self, *, model_name: str, prefix: str = "headwater_", engine: str = "0") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": engine}
        self._engines = EngineGauges(name=self.name, labels=self._labels)
        self._last_steps: dict[int, tuple[int, tuple[int, ...]]] = {}
        """Of each generation that may still step: the number of its last step, and its totals then."""
        self._make_request_metrics()
        self.activity = Activity(ttft=self.time_to_first_token, itl=self.inter_token_latency)
        """The last minute, for the live view."""
        self._make_step_metrics()
        self._make_http_metrics()
        self._make_key_metrics()

    def _make_step_metrics(self) -> None:
        self._step_totals = (
            self._counter("num_preemptions", "Sequences that had to give up their KV blocks."),
            self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
            self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
        )
        self.step_seconds = self._histogram("step_duration_seconds", "One engine step.", ITL_BOUNDS)
        self.iteration_tokens = self._histogram("iteration_tokens_total", "Tokens per engine step.", STEP_TOKEN_BOUNDS)

    def watch_engine(self, read: EngineReader) -> None:
        """Read gauges from `read` at every scrape, from now on."""
        if self._engines.read_serving is None:
            self.registry.register(self._engines)
        self._engines.read_serving = read

    def watch_leaving(self, read: EngineReader | None) -> None:
        """Another engine serves, and this one finishes what it has: its gauges have LEAVING as their engine."""
        self._engines.read_leaving = read

    def observe_step(self, generation: int, stats: StepStats) -> None:
        """Count one engine step; the same step a second time changes nothing."""
        last_step, before = self._last_steps.pop(generation, (-1, (0, 0, 0)))
        totals = (stats.total_preemptions, stats.total_prefix_query_tokens, stats.total_prefix_hit_tokens)
        self._last_steps[generation] = (stats.step_id, totals)
        if len(self._last_steps) > _NUM_GENERATIONS:
            del self._last_steps[next(iter(self._last_steps))]
        if stats.step_id == last_step:
            return
        for counter, now, then in zip(self._step_totals, totals, before, strict=True):
            counter.inc(max(0, now - then))
        self.step_seconds.observe(stats.step_seconds)
        self.iteration_tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens)
        self.activity.observe_step(generation, stats, now=time.monotonic())

    def count_finish(self, reason: FinishReason) -> None:
        """One sequence ended."""
        self._finished[reason].inc()

    def count_rejection(self, reason: str) -> None:
        """Admission control refused a request; `reason` is the limit that it hit."""
        self._rejections.labels(model_name=self._labels["model_name"], reason=reason).inc()

    def count_key_rejection(self, key_id: str) -> None:
        """Admission control refused a request of this key."""
        self._key_rejections.labels(self._labels["model_name"], key_id).inc()

    def set_key_live(self, key_id: str, num_sequences: int) -> None:
        """So many sequences of this key are in flight now."""
        self._key_live.labels(self._labels["model_name"], key_id).set(num_sequences)

    def count_key_tokens(self, key_id: str, *, prompt: int = 0, generated: int = 0) -> None:
        """Tokens of a key's sequences, counted as those of all are."""
        if prompt:
            self._key_prompt_tokens.labels(self._labels["model_name"], key_id).inc(prompt)
        if generated:
            self._key_generation_tokens.labels(self._labels["model_name"], key_id).inc(generated)

    def count_timeout(self, limit: str) -> None:
        """A request was ended because its deadline, or the longest wait in the queue, had come."""
        self._timeouts.labels(model_name=self._labels["model_name"], limit=limit).inc()

    def count_cut(self, reason: str) -> None:
        """A connection was closed for what its client does: slow_reader, slow_sender, or no_room for it."""
        self._cuts.labels(model_name=self._labels["model_name"], reason=reason).inc()

    def count_hand_over(self, *, is_exact: bool) -> None:
        """A sequence went on after its engine was replaced, with the very same tokens or perhaps not."""
        self._hand_overs["exact" if is_exact else "approximate"].inc()

    def count_resumption(self, source: str) -> None:
        """A stream went on after its connection; `source`: where the tokens came from that its client had."""
        self._resumptions.labels(*self._labels.values(), source).inc()

    def count_response(self, *, handler: str, method: str, status: int | None) -> None:
        """A request was answered; status None: the client was gone before the first byte."""
        self._responses.labels(handler, method, "disconnected" if status is None else str(status)).inc()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the form that the Accept header asks for."""
        for _, snapshot in self._engines.snapshots():
            if snapshot.last_step is not None:
                self.observe_step(snapshot.generation, snapshot.last_step)
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def name(self, stem: str) -> str:
        """A metric's full name."""
        return self._prefix + stem

    def _make_request_metrics(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of sequences that gave a first output.")
        self.cached_prompt_tokens = self._counter("prompt_tokens_cached", "Prompt tokens the prefix cache saved.")
        self.generation_tokens = self._counter("generation_tokens", "Output tokens accepted.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival of the request to its first token.", TTFT_BOUNDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between consecutive output tokens.", ITL_BOUNDS
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per output token after the first.", ITL_BOUNDS
        )
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Arrival to end.", LATENCY_BOUNDS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Waiting in the engine.", LATENCY_BOUNDS)
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "Leaving the queue to the first token.", LATENCY_BOUNDS
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "First token to last.", LATENCY_BOUNDS)
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of finished sequences.", TOKEN_BOUNDS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Output tokens of finished sequences.", TOKEN_BOUNDS
        )
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens asked for.", TOKEN_BOUNDS)
        self.params_n = self._histogram("request_params_n", "n asked for.", SAMPLE_BOUNDS)
        finished = Counter(
            self.name("request_success"),
            "Sequences that ended, by finish reason.",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )
        handed_over = Counter(
            self.name("sequences_handed_over"),
            "Sequences that went on after an engine was replaced.",
            [*self._labels, "resume"],
            registry=self.registry,
        )
        self._hand_overs = {
            resume: handed_over.labels(*self._labels.values(), resume) for resume in ("exact", "approximate")
        }
        self._resumptions = Counter(
            self.name("streams_resumed"),
            "Streams that went on after their connection, by where their tokens came from.",
            [*self._labels, "source"],
            registry=self.registry,
        )
        self._finished = {reason: finished.labels(*self._labels.values(), reason.value) for reason in FinishReason}

    def _make_key_metrics(self) -> None:
        labels = ["model_name", "key_id"]
        self._key_prompt_tokens, self._key_generation_tokens, self._key_rejections = (
            Counter(self.name(stem), description, labels, registry=self.registry)
            for stem, description in (
                ("key_prompt_tokens", "Prompt tokens of one API key's sequences that gave a first output."),
                ("key_generation_tokens", "Output tokens of one API key's sequences."),
                ("key_rejections", "Requests of one API key refused because a limit was reached."),
            )
        )
        self._key_live = Gauge(
            self.name("key_live_sequences"), "Sequences of one API key in flight.", labels, registry=self.registry
        )

    def _make_http_metrics(self) -> None:
        self._rejections = Counter(
            self.name("admission_rejections"),
            "Requests refused because a limit was reached.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._timeouts = Counter(
            self.name("requests_timed_out"),
            "Requests ended because their deadline, or the longest wait for a first output, had come.",
            ["model_name", "limit"],
            registry=self.registry,
        )
        self._cuts = Counter(
            self.name("connections_cut"),
            "Connections closed for what their clients do: read or send too slowly, or are too many.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._responses = Counter(
            self.name("http_responses"),
            "HTTP requests answered.",
            ["handler", "method", "status"],
            registry=self.registry,
        )

    def _counter(self, stem: str, description: str) -> Counter:
        counter = Counter(self.name(stem), description, list(self._labels), registry=self.registry)
        return counter.labels(*self._labels.values())

    def _histogram(self, stem: str, description: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(self.name(stem), description, bounds=bounds, labels=self._labels)
        self.registry.register(histogram)
        return histogram
