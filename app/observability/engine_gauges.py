"""The gauges of engines, read when Prometheus asks and not before: of the one that serves, and of one that leaves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from app.core.types import EngineLimits, StepStats

LEAVING = "leaving"
"""The label `engine` of one that only finishes what it has, beside the one that serves."""


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What the gauges read of an engine at a scrape."""

    state: str
    generation: int
    """0 before the first engine was started."""
    num_live_sequences: int
    last_step: StepStats | None
    limits: EngineLimits | None


EngineReader = Callable[[], EngineSnapshot]


class EngineGauges(Collector):
    """Registered once; what it reads may change."""

    def __init__(self, *, name: Callable[[str], str], labels: Mapping[str, str]) -> None:
        """`name` makes a metric's full name of its stem; `labels` are those of the engine that serves."""
        self._name = name
        self._labels = labels
        self.read_serving: EngineReader | None = None
        self.read_leaving: EngineReader | None = None

    def snapshots(self) -> list[tuple[str, EngineSnapshot]]:
        """As of now, by the value of the label `engine`."""
        readers = ((self._labels["engine"], self.read_serving), (LEAVING, self.read_leaving))
        return [(engine, read()) for engine, read in readers if read is not None]

    def collect(self) -> Iterable[Metric]:
        """Everything that is told of engines."""
        snapshots = self.snapshots()
        for stem, description, value_of in _GAUGES:
            family = GaugeMetricFamily(self._name(stem), description, labels=list(self._labels))
            for engine, snapshot in snapshots:
                family.add_metric(list({**self._labels, "engine": engine}.values()), value_of(snapshot))
            yield family
        newest = max(snapshot.generation for _, snapshot in snapshots)
        restarts = CounterMetricFamily(self._name("engine_restarts"), "Engines replaced.", labels=list(self._labels))
        restarts.add_metric(list(self._labels.values()), max(0, newest - 1))
        yield restarts
        limits = snapshots[0][1].limits
        if limits is not None:
            yield self._cache_config(limits)

    def _cache_config(self, limits: EngineLimits) -> GaugeMetricFamily:
        facts = {
            "block_size": limits.block_size,
            "num_gpu_blocks": limits.num_kv_blocks,
            "kv_cache_size_tokens": limits.num_kv_blocks * limits.block_size,
            "cache_dtype": limits.dtype,
        }
        family = GaugeMetricFamily(self._name("cache_config_info"), "KV cache.", labels=[*self._labels, *facts])
        family.add_metric([*self._labels.values(), *map(str, facts.values())], 1)
        return family


def _num_running(snapshot: EngineSnapshot) -> float:
    step = snapshot.last_step
    return 0 if step is None else min(step.num_running, snapshot.num_live_sequences)


def _num_waiting(snapshot: EngineSnapshot) -> float:
    return snapshot.num_live_sequences - _num_running(snapshot)


def _kv_usage(snapshot: EngineSnapshot) -> float:
    step = snapshot.last_step
    if step is None or not snapshot.num_live_sequences or not step.num_kv_blocks:
        return 0.0
    return step.num_kv_blocks_used / step.num_kv_blocks


_GAUGES: tuple[tuple[str, str, Callable[[EngineSnapshot], float]], ...] = (
    ("num_requests_running", "Sequences that share the engine's steps.", _num_running),
    ("num_requests_waiting", "Sequences in the queue.", _num_waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", _kv_usage),
    ("engine_generation", "1 for the first engine, one more with each.", lambda snapshot: snapshot.generation),
    ("engine_ready", "1 while the engine takes requests.", lambda snapshot: float(snapshot.state == "ready")),
)
