"""The dashboard and the alerts ask for what /metrics exports, in a language that Prometheus accepts."""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml

from app.core.types import FinishReason
from app.observability.engine_gauges import EngineSnapshot
from app.observability.metrics import Metrics
from tests.engine_facts import LIMITS, STEP

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROVISIONING = DEPLOY / "grafana" / "provisioning"
ALERT_CASES = ROOT / "tests" / "data" / "alert_cases.yml"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/headwater.json").read_text(encoding="utf-8"))
SCRAPE: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_PROMETHEUS = frozenset({"up", "ALERTS"})
LABELS_OF_PROMETHEUS = frozenset({"instance", "job", "alertname", "alertstate"})
SELECTOR = re.compile(r"\b(headwater_\w+|up|ALERTS)\b\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|=)\s*"([^"]*)"')
START_SECONDS = 30


class BusyServer:
    """Metrics of a server on which everything happens between two scrapes, engine deaths and refusals included."""

    def __init__(self) -> None:
        self._metrics = Metrics(model_name="m")
        self._generation = 1
        self._metrics.watch_engine(self._snapshot)

    def _snapshot(self) -> EngineSnapshot:
        return EngineSnapshot("ready", self._generation, 5, STEP, LIMITS)

    def scrape(self) -> str:
        """What /metrics says once more has happened."""
        metrics = self._metrics
        self._generation += 1
        for histogram in (
            *(metrics.time_to_first_token, metrics.inter_token_latency, metrics.time_per_output_token),
            *(metrics.e2e_latency, metrics.queue_time, metrics.prefill_time, metrics.decode_time),
        ):
            histogram.observe(0.02)
        for counter in (metrics.prompt_tokens, metrics.cached_prompt_tokens, metrics.generation_tokens):
            counter.inc(7)
        for reason in FinishReason:
            metrics.count_finish(reason)
        for is_exact in (True, False):
            metrics.count_hand_over(is_exact=is_exact)
        metrics.count_rejection("max_live_sequences")
        for status in (200, 429, 503, None):
            metrics.count_response(handler="/v1/completions", method="POST", status=status)
        metrics.observe_step(self._generation, msgspec.structs.replace(STEP, step_id=self._generation))
        return metrics.render()[0].decode()


def exported() -> Mapping[str, Mapping[str, set[str]]]:
    """Of each sample name the labels, and of each label the values."""
    samples: dict[str, dict[str, set[str]]] = {}
    for name, labels in re.findall(r"^(\w+)\{([^}]*)\}", BusyServer().scrape(), re.MULTILINE):
        values = samples.setdefault(name, defaultdict(set))
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            values[label].add(value)
    return samples


def panel_queries() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def annotation_queries() -> list[str]:
    return [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]


def variable_queries() -> list[str]:
    """`label_values(metric, label)` is Grafana's, not Prometheus's: the metric stands for it."""
    texts = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    return [re.sub(r"label_values\((\w+), \w+\)", r"\1", text) for text in texts]


def alert_queries() -> list[str]:
    return [rule["expr"] for rule in RULES]


def all_queries() -> list[str]:
    return [*panel_queries(), *annotation_queries(), *variable_queries(), *alert_queries()]


def as_prometheus_reads_it(query: str) -> str:
    """The query with Grafana's variables filled in as Grafana fills them."""
    filled = query.replace("$__rate_interval", "10s").replace("$__range", "1m").replace("$instance", ".*")
    assert "$" not in filled, query
    return filled


def test_every_query_names_exported_metrics_labels_and_values() -> None:
    samples = exported()
    for query in all_queries():
        selectors = SELECTOR.findall(query)
        assert selectors, query
        grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
        for name, matchers in selectors:
            if name in OF_PROMETHEUS:
                continue
            assert name in samples, f"{name} is not exported: {query}"
            assert grouped - LABELS_OF_PROMETHEUS <= set(samples[name]), query
            for label, operator, value in MATCHER.findall(matchers):
                if label in LABELS_OF_PROMETHEUS:
                    continue
                pattern = value if operator == "=~" else re.escape(value)
                assert any(re.fullmatch(pattern, known) for known in samples[name][label]), (query, label)


def test_legends_name_labels_that_the_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert "by (" not in target["expr"] or f"by ({label})" in target["expr"], target


def test_every_panel_says_what_it_shows_and_shares_the_provisioned_source() -> None:
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    expected = {"type": source["type"], "uid": source["uid"]}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert all(owner["datasource"] == expected for owner in (panel, *panel["targets"]))
    for owner in (*DASHBOARD["templating"]["list"], *DASHBOARD["annotations"]["list"]):
        assert owner["datasource"] == expected
    host, port = source["url"].removeprefix("http://").split(":")
    assert f"127.0.0.1:{port}:{port}" in SERVICES[host]["ports"]
    assert source["jsonData"]["timeInterval"] == SCRAPE["global"]["scrape_interval"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_compose_mounts_what_the_configurations_name() -> None:
    mounts = {
        target: ROOT / source
        for name in ("prometheus", "grafana")
        for source, target, *_ in (volume.split(":") for volume in SERVICES[name]["volumes"])
        if source.startswith("./")
    }
    assert all(path.exists() for path in mounts.values())
    assert SCRAPE["rule_files"] == ["alerts.yml"] and mounts["/etc/prometheus/alerts.yml"].samefile(
        DEPLOY / "alerts.yml"
    )
    provider = yaml.safe_load((PROVISIONING / "dashboards" / "headwater.yml").read_text())["providers"][0]
    folder = mounts[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file() and str(Path(home).parent) == provider["options"]["path"]


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"] and rule["annotations"]["action"].endswith(".")
    pages = re.findall(r"docs/[\w/.-]+\.md", (DEPLOY / "alerts.yml").read_text())
    assert pages and all((ROOT / page).is_file() for page in pages)


def test_each_alert_fires_in_a_case_and_is_quiet_in_another() -> None:
    checks = [check for case in yaml.safe_load(ALERT_CASES.read_text())["tests"] for check in case["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == names


@pytest.mark.parametrize("arguments", [("check", "rules", DEPLOY / "alerts.yml"), ("test", "rules", ALERT_CASES)])
def test_promtool_is_content(arguments: tuple[str | Path, ...]) -> None:
    done = subprocess.run([debian("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_answers_every_query(tmp_path: Path) -> None:
    """A real Prometheus scrapes what we export; panels and annotations then have something to show."""
    with exporter(BusyServer().scrape) as target, prometheus(tmp_path, target) as api:
        wait_until(lambda: at_least(ask(api, "count_over_time(headwater_engine_ready[1m])"), 4))
        for query in [*panel_queries(), *annotation_queries(), *variable_queries()]:
            found = ask(api, as_prometheus_reads_it(query))
            assert found or "ALERTS" in query, f"nothing to show: {query}"
        for query in alert_queries():
            ask(api, query)


def debian(program: str) -> str:
    """Path of a program of Debian's package `prometheus`; skips the test where it is missing."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} (Debian's prometheus) is not installed")
    return path


@contextmanager
def exporter(scrape: Callable[[], str]) -> Iterator[str]:
    """Serve `scrape()` at every path; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = scrape().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Our configuration with another target and a short interval, run; gives the address of the query API."""
    key = folder / "scrape-key"  # empty, as compose mounts it where no key is set
    key.touch()
    changes = {"authorization": {"credentials_file": str(key)}, "static_configs": [{"targets": [target]}]}
    scrape = {**SCRAPE["scrape_configs"][0], **changes}
    configuration = {
        "global": {"scrape_interval": "100ms", "scrape_timeout": "100ms"},
        "rule_files": [str(DEPLOY / "alerts.yml")],
        "scrape_configs": [scrape],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        debian("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: is_ready(f"http://{address}", process, folder / "log"))
            yield f"http://{address}/api/v1/query"
        finally:
            process.kill()


def is_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(api: str, query: str) -> list[dict[str, Any]]:
    """The series that a query finds; fails where Prometheus refuses it."""
    answer = httpx.get(api, params={"query": query}).json()
    assert answer["status"] == "success", f"{query}: {answer}"
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def at_least(series: list[dict[str, Any]], number: int) -> bool:
    return bool(series) and float(series[0]["value"][1]) >= number


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not so after {START_SECONDS} s"
        time.sleep(0.05)
