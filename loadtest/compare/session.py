"""One peer of the comparison while it is measured: how it is started, and how requests are put in its words."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from loadtest.compare.measure import load
from loadtest.compare.peers import Peer, Places
from loadtest.compare.server import Server, ServerFailed, free_port, tree_pss_bytes
from loadtest.prompts import word_prompt
from loadtest.record import Outcome, RequestRecord
from loadtest.run import RunConfig, RunResult
from loadtest.summary import summarise

Load = Callable[[RunConfig], RunResult]


@dataclass(frozen=True)
class Running:
    """A peer that answers."""

    url: str
    """Empty where it has none."""
    ready_s: float
    """From its start to its first answer."""
    load: Load
    """One run; raises ServerFailed where it breaks."""
    memory_bytes: Callable[[], int]


@contextmanager
def session(peer: Peer, places: Places) -> Iterator[Running]:
    """It runs inside, and is gone with all its processes afterwards. Raises ServerFailed where it does not answer."""
    with _in_process(peer, places) if peer.is_in_process else _serving(peer, places) as running:
        yield running


@contextmanager
def _serving(peer: Peer, places: Places) -> Iterator[Running]:
    port = free_port()
    command, environment = places.command(peer, port=port), places.environment(peer)
    log = places.peers / "logs" / f"{peer.name}.log"
    with Server(command, environment=environment, port=port, log=log) as server:
        ready_s = server.wait_ready(request_fields(peer, places), timeout_s=peer.ready_timeout_s)
        yield Running(server.url, ready_s, load, server.memory_bytes)


@contextmanager
def _in_process(peer: Peer, places: Places) -> Iterator[Running]:
    """A worker that is spoken to by lines of JSON: it generates in its own process, and nothing is sent over HTTP."""
    began = time.monotonic()
    log = places.peers / "logs" / f"{peer.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | places.environment(peer)
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            places.command(peer, port=0),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as worker,
    ):
        assert worker.stdin is not None and worker.stdout is not None
        lines, answers = worker.stdin, worker.stdout

        def answer() -> list[dict[str, object]]:
            line = answers.readline()
            if not line.startswith(("[", '"')):
                raise ServerFailed(f"the worker of {peer.name} said {line[:200]!r}; see {log}")
            return json.loads(line)  # type: ignore[no-any-return]

        def closed_loop(config: RunConfig) -> RunResult:
            prompts = [
                word_prompt(config.input_len, shared=config.shared_prefix, seed=config.seed, index=index)
                for index in range(config.num_requests)
            ]
            asked = {"prompts": prompts, "concurrency": config.concurrency, "output_len": config.output_len}
            lines.write(json.dumps(asked) + "\n")
            lines.flush()
            return result_of(config, answer())

        try:
            answer()
            yield Running("", time.monotonic() - began, closed_loop, lambda: tree_pss_bytes(worker.pid))
        finally:
            worker.kill()


def result_of(config: RunConfig, moments: list[dict[str, object]]) -> RunResult:
    """What a client would have recorded, from the moments that a worker noted of each request."""
    records = []
    for index, seen in enumerate(moments):
        record = msgspec.convert({"index": index, "scheduled_ns": seen["sent_ns"], **seen}, RequestRecord)
        record.end_ns = record.output_ns[-1] if record.output_ns else record.sent_ns
        record.outcome = Outcome.COMPLETED if record.output_ns else Outcome.TRUNCATED
        record.prompt_tokens = config.input_len
        records.append(record)
    return RunResult(config, summarise(records, targets={}, offered_rate=None, client_cpu_s=0.0), records)


def with_peer(config: RunConfig, peer: Peer, places: Places) -> RunConfig:
    """The same run in the words that this server takes."""
    fields = dict(request_fields(peer, places))
    model = fields.pop("model", None)
    return msgspec.structs.replace(
        config,
        model=None if model is None else str(model),
        ignore_eos=peer.ignores_eos,
        keep_alive=peer.keeps_connections,
        extra_body=fields,
    )


def request_fields(peer: Peer, places: Places) -> Mapping[str, object]:
    """The fields that every request to this server carries."""
    model = {} if peer.model is None else {"model": places.fill(peer.model)}
    return model | dict(peer.extra_body)
