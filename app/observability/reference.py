"""docs/reference/metrics.md, read off a registry in which everything was observed once.

`python -m app.observability.reference` prints the page; a test holds the committed one to it.
"""

import sys

from app.core.types import EngineLimits
from app.observability.engine_gauges import EngineSnapshot
from app.observability.metrics import Metrics

_LIMITS = EngineLimits(
    max_model_len=1,
    vocab_size=1,
    eos_token_ids=(),
    num_kv_blocks=1,
    block_size=1,
    kv_bytes=0,
    weight_bytes=0,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    device="",
    dtype="",
    tier="",
    tier_reason="",
    row_independent=True,
    fingerprint="",
    load_seconds=0.0,
)

_PAGE = """\
# Metrics

This page is generated from `app/observability` (`python -m app.observability.reference`).

`GET /metrics` speaks Prometheus's text format, or OpenMetrics where the Accept header asks for it. The
stems, labels and types are vLLM's where vLLM has the metric, with finer buckets at the low end:
`--metrics-prefix vllm:` makes its dashboards work as they are.

A *request* in a metric's name is one sequence: `n` samples of a prompt are n of them. Each admitted
sequence is counted once in `request_success_total`, with the reason of its end: `stop`, `length`, `abort`
(the client left, or the server stopped) or `error`. Requests refused before that are in
`admission_rejections_total` (a limit was reached) and in `http_responses_total` by status. Counters go on
when an engine is replaced. The gauges of requests and of the KV cache are 0 while nothing is in flight. After a
reload to another model the gauges of an engine that finishes what it has are told with `engine="leaving"`.

| name | type | labels | meaning |
| --- | --- | --- | --- |
{rows}
"""


def reference_page() -> str:
    """The whole page."""
    metrics = Metrics(model_name="")
    metrics.count_rejection("")
    metrics.count_cut("")
    metrics.count_timeout("")
    metrics.count_key_rejection("")
    metrics.count_key_tokens("", prompt=1, generated=1)
    metrics.set_key_live("", 1)
    metrics.count_response(handler="", method="", status=None)
    metrics.watch_engine(lambda: EngineSnapshot("", 0, 0, None, _LIMITS))
    rows: list[str] = []
    for family in metrics.registry.collect():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return _PAGE.format(rows="\n".join(sorted(rows)))


def main() -> None:
    """Print the page."""
    sys.stdout.write(reference_page())


if __name__ == "__main__":
    main()
