"""One journal and the engines that come and go under it: what clients see must be as if there were one, and no death.

An engine is a scheduler with its pool over a runner that is the oracle (`tests.property.driver`). What it sends stands
on the wire until it is received; a death loses what is on the wire, and the next engine gets what the journal holds.
Blame is the client's own (`app.client.handover`).
"""

from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from app.client.handover import blame
from app.client.journal import Journal, LiveSequence
from app.core.errors import EngineFailed
from app.core.plan import StepPlan
from app.core.types import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from app.ipc.progress import request_key
from app.scheduler import SchedulerConfig
from tests.fakes import Continuation, continuation
from tests.property.driver import REFUSAL, Driver

T = TypeVar("T")
CONVICTED = "proved"


class Engine(Driver):
    """A driver that says what it sends, step by step."""

    def __init__(self, config: SchedulerConfig, *, lag: int, draft: bool) -> None:
        super().__init__(config, lag=lag, draft=draft)
        self.sent: list[EngineOutput] = []
        self.last_plan_ids: tuple[str, ...] = ()
        """Requests of the last step that was begun: what the progress page says."""

    def take_sent(self) -> tuple[EngineOutput, ...]:
        """One message."""
        sent, self.sent = tuple(self.sent), []
        return sent

    def _take(self, output: EngineOutput) -> None:
        super()._take(output)
        self.sent.append(output)

    def _check_plan(self, plan: StepPlan) -> None:
        super()._check_plan(plan)
        self.last_plan_ids = tuple(sequence.request_id for sequence in self.scheduler._in_flight[plan.step_id])


@dataclass
class Client:
    """What one client has been told."""

    request: EngineRequest
    """As it was first asked."""
    expected: Continuation
    live: LiveSequence
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: EngineOutput | None = None
    error: str = ""
    num_cached_tokens: int | None = None
    num_silent: int = 0
    """Tokens that are drawn again, which it has already."""

    @property
    def is_over(self) -> bool:
        return self.finish is not None or bool(self.error)


class World:
    """A client process, its journal, and one engine at a time."""

    def __init__(self, config: SchedulerConfig, *, lag: int = 0, draft: bool = False) -> None:
        self.config = config
        self.journal = Journal()
        self.clients: dict[str, Client] = {}
        self.poisons: set[str] = set()
        """Requests that end the engine in the step that computes them."""
        self.num_deaths = self.num_steps = self.num_resumed = self.num_lost = 0
        self._lag, self._draft = lag, draft
        self._wire: deque[tuple[EngineOutput, ...]] = deque()
        self._num_ids = 0
        self.engine = self._new_engine()

    def add(self, request: EngineRequest, *, is_poison: bool = False) -> str:
        """Ask for something whose id is made here; returns the id."""
        request = self._named(request)
        expected = continuation(
            request,
            vocab_size=self.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
            max_sequence_len=self.config.max_sequence_len,
        )
        if is_poison:
            self.poisons.add(request.request_id)
        self.clients[request.request_id] = Client(request, expected, self.journal.admit(request))
        self._send(request)
        return request.request_id

    def step(self) -> None:
        """One step of the engine, or its death in it where a poison is computed: then nothing of it is sent."""
        plan = self.engine.step()
        self.num_steps += 1
        message = self.engine.take_sent()
        if plan is not None and self.poisons.intersection(self.engine.last_plan_ids):
            self.die(is_self_inflicted=True)
        elif message:
            self._wire.append(message)

    def receive(self, count: int) -> None:
        """So many messages arrive."""
        for _ in range(min(count, len(self._wire))):
            for output in self._wire.popleft():
                self.journal.receive(output)

    def consume(self, request_id: str) -> None:
        """A client takes what there is for it: what gathered comes as one."""
        client = self.clients[request_id]
        while not client.is_over and (client.live._outputs or client.live._failure is not None):
            try:
                self._tell(client, _now(client.live.next_output()))
            except EngineFailed as error:
                client.error = str(error)

    def die(self, *, is_self_inflicted: bool) -> None:
        """The engine ends; what was on the wire is lost, and the next one gets the live sequences."""
        keys = [request_key(request_id) for request_id in self.engine.last_plan_ids]
        self.num_lost += sum(len(output.token_ids) for message in self._wire for output in message)
        self._wire.clear()
        self.num_deaths += 1
        verdict = blame(self.journal, keys, is_self_inflicted=is_self_inflicted)
        if verdict.convicted is not None:
            guilty = verdict.convicted.request.request_id
            assert guilty in self.poisons, f"{guilty} is innocent"
            verdict.convicted.fail(CONVICTED)
            self.journal.remove(verdict.convicted)
        self.engine = self._new_engine()
        for sequence in self.journal:
            self._send(sequence.hand_over())

    def abort(self, request_id: str) -> None:
        """The client goes away."""
        self._leave(self.clients.pop(request_id))

    def resume(self, request_id: str, *, hands_back: bool) -> str:
        """The client's connection ends, and it asks again from where it stands, with its tokens or without; the id."""
        client = self.clients.pop(request_id)
        self._leave(client)
        self.num_resumed += 1
        request = self._named(client.request)
        client.num_silent = 0
        if client.token_ids:
            params = msgspec.structs.replace(request.params, num_prompt_logprobs=None)
            request = msgspec.structs.replace(request, params=params)
            if hands_back:
                tokens = (*client.request.output_token_ids, *client.token_ids)
                request = msgspec.structs.replace(request, output_token_ids=tokens)
            else:
                client.num_silent = len(client.token_ids)
        else:
            client.prompt_logprobs.clear()
        if request_id in self.poisons:
            self.poisons.add(request.request_id)
        client.live = self.journal.admit(request)
        client.num_cached_tokens = None
        self.clients[request.request_id] = client
        self._send(request)
        return request.request_id

    def run_until_idle(self) -> None:
        """Everything ends; what was asked is whole, or proved to end engines."""
        bound = (len(self.clients) + 1) * (self.config.max_sequence_len + 8) * (self._lag + 3)
        for _ in range(bound):
            self.receive(100)
            for request_id in self.clients:
                self.consume(request_id)
            if all(client.is_over for client in self.clients.values()):
                break
            self.step()
        assert not len(self.journal)
        for client in self.clients.values():
            assert client.is_over, f"{client.request} does not end"
            self._check_whole(client)
        self.engine.run_until_idle()

    def check(self) -> None:
        """What must hold between any two calls."""
        self.engine.check()
        live = {sequence.request.request_id for sequence in self.journal}
        assert set(self.engine.live_ids) <= live, "an engine computes for nobody"
        waited_for = {name for name, client in self.clients.items() if not client.live.is_finished}
        assert live == waited_for, "the journal and the clients do not agree"

    def _named(self, request: EngineRequest) -> EngineRequest:
        self._num_ids += 1
        return msgspec.structs.replace(request, request_id=f"request-{self._num_ids}")

    def _new_engine(self) -> Engine:
        return Engine(self.config, lag=self._lag, draft=self._draft)

    def _send(self, request: EngineRequest) -> None:
        self.engine.add(request)
        if message := self.engine.take_sent():
            self._wire.append(message)

    def _leave(self, client: Client) -> None:
        request_id = client.live.request.request_id
        if self.journal.remove(client.live) and request_id in self.engine.live_ids:
            self.engine.abort(request_id)

    def _tell(self, client: Client, output: EngineOutput) -> None:
        token_ids, logprobs = list(output.token_ids), list(output.logprobs)
        again = token_ids[: client.num_silent]
        start = len(client.token_ids) - client.num_silent
        assert again == client.token_ids[start : start + len(again)], "what is drawn again is something else"
        client.num_silent -= len(again)
        client.token_ids += token_ids[len(again) :]
        client.logprobs += logprobs[len(again) :]
        client.prompt_logprobs += output.prompt_logprobs
        assert client.num_cached_tokens in (None, output.num_cached_tokens), "num_cached_tokens changed"
        client.num_cached_tokens = output.num_cached_tokens
        expected = client.expected
        assert tuple(client.token_ids) == expected.token_ids[: len(client.token_ids)], "a token is lost or doubled"
        assert tuple(client.logprobs) == expected.logprobs[: len(client.logprobs)]
        assert tuple(client.prompt_logprobs) == expected.prompt_logprobs[: len(client.prompt_logprobs)]
        if output.finish_reason is not None:
            client.finish = output

    def _check_whole(self, client: Client) -> None:
        if client.error:
            assert client.error == CONVICTED
            return
        assert client.finish is not None
        if client.finish.error == REFUSAL:
            return
        expected = client.expected
        assert tuple(client.token_ids) == expected.token_ids
        assert tuple(client.logprobs) == expected.logprobs
        assert tuple(client.prompt_logprobs) == expected.prompt_logprobs
        assert client.finish.finish_reason is expected.finish_reason is not FinishReason.ERROR
        assert client.finish.stop_token_id == expected.stop_token_id


def _now(waiting: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        waiting.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits")
