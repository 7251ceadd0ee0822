"""`kill -9` of a whole server under live streams, each of which goes on on a second server that shares nothing."""

import json
import random
import time

from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.replicas import Body, Client, Replica, Spoken, all_moved, replicas, undisturbed, wait_for

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ITEM = "portable"
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 60}, "population": {"type": "integer"}},
    "required": ["name", "population"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
API_KILL = "sigkill_api"
"""The row of the matrix."""
API_FLAGS = ("--max-num-batched-tokens", "256")
API_STEP_SECONDS = 0.05
"""So long that a moment within a prompt can be hit from outside."""

Asked = tuple[str, str, Body]
"""Kind, route and request."""


def completions(bodies: list[tuple[str, Body]]) -> list[Asked]:
    """Requests of the other items, for these servers."""
    return [(kind, COMPLETIONS, body) for kind, body in bodies]


def chats(count: int, *, max_tokens: int) -> list[Asked]:
    """Chats, calls of tools and JSON of a schema, for a model that reads."""
    asked: list[Asked] = []
    for index in range(count):
        messages = [{"role": "user", "content": f"Describe city {index} of Europe 北京."}]
        common: Body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.9, "seed": index}
        schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
        asked += [
            ("chat", CHAT, common),
            ("tools", CHAT, common | {"tools": [WEATHER], "tool_choice": "required"}),
            ("schema", CHAT, common | {"response_format": schema}),
        ]
    return asked


def run_portable(
    flags: tuple[str, ...],
    asked: list[Asked],
    ledger: Ledger,
    *,
    cell: str,
    num_streams: int,
    num_kills: int,
    seconds: float,
    seed: int,
) -> None:
    """At most so many kills in at most so many seconds. Every other stream hands its token ids back."""
    rng = random.Random(seed)
    deadline = time.monotonic() + seconds
    with replicas(2, *flags) as (victim, survivor):
        oracle = Oracle(survivor)
        asked = [_with_stop(one, oracle) for one in asked]
        for _ in range(num_kills):
            if time.monotonic() > deadline:
                return
            victim.start()
            clients = [Client(*rng.choice(asked), hands_back=index % 2 == 0) for index in range(num_streams)]
            before = survivor.num_resumed
            first, last = _kill_under(clients, victim, survivor, rng)
            after = survivor.num_resumed
            wrong = [difference for client in clients if (difference := oracle.difference(client))]
            ledger.add(
                ITEM,
                cell,
                Outcome.WRONG if wrong else Outcome.SURVIVED,
                detail="; ".join(wrong),
                streams=len(clients),
                cut=sum(client.num_cuts > 0 for client in clients),
                bytes=sum(client.spoken.num_bytes for client in clients),
                differing=len(wrong),
                first_s=first,
                last_s=last,
                **{f"by_{source}": after[source] - before.get(source, 0) for source in after},
            )


class Oracle:
    """What requests say where nothing interrupts them, asked of one server."""

    def __init__(self, server: Replica) -> None:
        self._server = server
        self._known: dict[str, Spoken] = {}

    def says(self, path: str, body: Body) -> Spoken:
        """The whole answer."""
        key = json.dumps([path, body])
        if key not in self._known:
            self._known[key] = undisturbed(self._server.url, path, body)
        return self._known[key]

    def difference(self, client: Client) -> str:
        """What is wrong with a stream beside its undisturbed run; empty where nothing is."""
        if client.error:
            return f"{client.kind}: {client.error}"
        # An unseeded one has an undisturbed run with the seed that it drew.
        expected = self.says(client.path, {"seed": client.spoken.seed} | client.body)
        return "" if client.spoken.as_bytes() == expected.as_bytes() else f"{client.kind}: differs"


def _with_stop(asked: Asked, oracle: Oracle) -> Asked:
    """A stop string that the model says."""
    kind, path, body = asked
    if kind != "stop":
        return asked
    text = oracle.says(path, body).choices[0]["text"]
    middle = len(text) * 2 // 3
    return kind, path, body | {"stop": [text[middle : middle + 5] or "\n"]}


def _kill_under(clients: list[Client], victim: Replica, survivor: Replica, rng: random.Random) -> tuple[float, float]:
    """Kill at a random moment; seconds to the next event of the first stream that was cut, and of the last."""

    def num_events() -> int:
        return sum(client.num_events for client in clients)

    for client in clients:
        client.start([victim.url, survivor.url])
    wait_for(lambda: all(client.num_events or client.is_over for client in clients))
    moment = num_events() + rng.randrange(len(clients) * 48)
    wait_for(lambda: num_events() >= moment or all(client.is_over for client in clients))
    live = [client for client in clients if not client.is_over]
    at = victim.kill()
    wait_for(lambda: not live or any(client.last_at > at or client.is_over for client in live))
    first = time.monotonic() - at
    wait_for(lambda: all_moved(live, at))
    last = time.monotonic() - at
    for client in clients:
        client.join()
    return first, last


def run_api_kills(ledger: Ledger, phases: list[str], flags: tuple[str, ...], bystanders: list[Asked]) -> None:
    """The matrix's row of the API process's death: one trial for each phase, beside streams that must not change."""
    if not phases:
        return
    with replicas(2, *flags, *API_FLAGS) as (victim, survivor):
        oracle = Oracle(survivor)
        for phase in phases:
            victim.start()
            judged = _api_kill(phase, victim, survivor, bystanders)
            wrong = [difference for client in judged if (difference := oracle.difference(client))]
            outcome = Outcome.WRONG if wrong else Outcome.SURVIVED
            ledger.add("matrix", f"{API_KILL} x {phase}", outcome, detail="; ".join(wrong))


def _api_kill(phase: str, victim: Replica, survivor: Replica, bystanders: list[Asked]) -> list[Client]:
    """The streams to be judged: all but the one that leaves."""
    urls = [victim.url, survivor.url]
    others = [Client(*one, hands_back=index % 2 == 0) for index, one in enumerate(bystanders)]
    aimed = _aimed_at(phase)
    if phase == "idle":
        victim.kill()
    for client in others:
        client.start(urls)
    wait_for(lambda: all(client.num_events or client.is_over for client in others))
    if phase == "start":
        victim.kill_engine()
    elif phase == "drain":
        victim.terminate()
    num_live = victim.num_live if phase in ("prefill", "chunked_prefill") else 0
    aimed.start(urls if phase not in ("start", "drain") else [survivor.url])
    wait_for(lambda: _is_reached(phase, aimed, victim, num_live))
    victim.kill()
    for client in (*others, aimed):
        client.join()
    return others if phase == "abort" else [*others, aimed]


def _aimed_at(phase: str) -> Client:
    num_prompt = 900 if phase == "chunked_prefill" else 150
    prompt = [*range(3000, 3000 + num_prompt), random.randrange(5000, 40_000)]  # no cache has its end
    body: Body = {"prompt": prompt, "max_tokens": 24, "ignore_eos": True, "temperature": 0.5, "seed": 4}
    return Client("the one in question", COMPLETIONS, body, leaves_after=4 if phase == "abort" else None)


def _is_reached(phase: str, aimed: Client, victim: Replica, num_live: int) -> bool:
    if phase in ("prefill", "chunked_prefill"):
        return aimed.num_events > 0 or victim.num_live > num_live
    least = {"decode": 4, "last_token": 23, "abort": 4}.get(phase, 0)
    return aimed.num_events >= least or aimed.is_over
