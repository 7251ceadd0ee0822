"""Fault x phase: one fault in one phase of one request, beside streams that must not change."""

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import get_args

import msgspec

from app.client.settings import Supervision
from app.settings import Settings
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.portable import API_KILL, API_STEP_SECONDS, completions, run_api_kills
from loadtest.faults.server import FaultServer, scripted_flags, scripted_settings, serving, until
from loadtest.faults.streams import Body, Said, Stream, make_oracle, run_stream, scripted_bodies
from loadtest.faulty_engine import GRAMMAR_CRASH, Fault, Kind

TARGET = 777
PHASES = ("start", "idle", "prefill", "chunked_prefill", "decode", "last_token", "abort", "drain")
KINDS = (*get_args(Kind), "no_descriptors")
SUPERVISION = Supervision(
    hang_seconds=0.8, unknown_step_seconds=0.1, unknown_token_seconds=0.0, tick_seconds=0.1, load_seconds=4.0
)
"""Impatient, so that hangs cost the suite less time."""
PATIENCE_SECONDS = 25.0
NOT_APPLICABLE = {
    "tokenizer exception": "tokenizing happens before admission, in the API process; tests/contract holds it",
    "full disk": "neither process writes to a disk while it serves",
}
"""Rows of the plan that are not run, and why."""


def cells() -> list[tuple[str, str]]:
    """All (kind, phase) that mean something."""
    row_phases = ("prefill", "chunked_prefill", "decode", "last_token")
    descriptor_phases = ("idle", "decode")
    return [
        (kind, phase)
        for phase in PHASES
        for kind in KINDS
        if (kind != "row_error" or phase in row_phases) and (kind != "no_descriptors" or phase in descriptor_phases)
    ] + [(API_KILL, phase) for phase in PHASES]


def settings() -> Settings:
    """Steps of a few milliseconds; a long prompt takes several."""
    return scripted_settings(step_seconds=0.004, max_num_batched_tokens=256)


class Matrix:
    """Runs trials on one server, whose engines come and go."""

    def __init__(self, server: FaultServer, ledger: Ledger) -> None:
        self._server = server
        self._ledger = ledger
        self._others: list[tuple[str, Body, Said]] = []
        self._expected: dict[bool, Said] = {}
        """Of the request in question, with a grammar and without."""
        self._num_trials = 0

    async def prepare(self) -> None:
        """Uninterrupted runs of everything."""
        bodies = [each for each in scripted_bodies(9, max_tokens=60) if each[0] in ("greedy", "n=2", "logprobs")]
        self._others = await make_oracle(self._server.port, bodies)
        for has_grammar in (False, True):
            body = _victim("decode", has_grammar=has_grammar)
            [(_, _, self._expected[has_grammar])] = await make_oracle(self._server.port, [("victim", body)])

    async def trial(self, kind: str, phase: str) -> Outcome:
        """One trial; appended to the ledger."""
        server = self._server
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                outcome, detail = await self._try(kind, phase)
        except TimeoutError:
            outcome, detail = Outcome.WRONG, f"nothing for {PATIENCE_SECONDS:g} s; {server.client.status.detail}"
        if server.disarm():
            outcome, detail = Outcome.WRONG, f"the fault did not strike; {detail}"
        self._ledger.add("matrix", f"{kind} x {phase}", outcome, detail=detail)
        return outcome

    async def _try(self, kind: str, phase: str) -> tuple[Outcome, str]:
        server = self._server
        others = [Stream(body, name) for name, body, _ in self._others]
        self._num_trials += 1
        victim = Stream(_victim(phase, self._num_trials, has_grammar=kind == GRAMMAR_CRASH), "victim")
        if phase == "idle":
            await self._while_idle(kind, victim.body)
        tasks = [asyncio.create_task(run_stream(server.port, stream)) for stream in others]
        await until(lambda: all(stream.last_at or stream.is_done for stream in others))
        if phase == "start" and kind == GRAMMAR_CRASH:
            return await self._crash_at_start(tasks, others, victim)
        if phase == "start":
            server.arm(_fault(kind, phase))
            server.kill_engine()
            await until(lambda: not server.is_armed and server.is_ready)
        elif phase == "drain":
            server.arm(_fault(kind, "decode"))
        elif phase != "idle" and kind != "no_descriptors":
            server.arm(_fault(kind, phase))
        with _no_descriptors_after_connecting() if kind == "no_descriptors" and phase != "idle" else _nothing():
            await self._run_victim(victim, kind=kind, phase=phase)
            await asyncio.gather(*tasks)
        return await self._judge(others, victim, phase=phase)

    async def _crash_at_start(
        self, tasks: list[asyncio.Task[Stream]], others: list[Stream], victim: Stream
    ) -> tuple[Outcome, str]:
        """A new engine prepares the grammars of what it is handed: there it crashes."""
        server = self._server
        tasks.append(asyncio.create_task(run_stream(server.port, victim)))
        await until(lambda: bool(victim.last_at) or victim.is_done)
        server.arm(_fault(GRAMMAR_CRASH, "start"))
        server.kill_engine()
        await asyncio.gather(*tasks)
        return await self._judge(others, victim, phase="start")

    async def _run_victim(self, victim: Stream, *, kind: str, phase: str) -> None:
        server = self._server
        if phase == "abort":
            await _leave_early(server.port, victim)
            await until(lambda: not server.is_armed)
            return
        running = asyncio.create_task(run_stream(server.port, victim))
        if kind == "no_descriptors" and phase != "idle":
            await until(lambda: bool(victim.last_at))
            server.kill_engine()
        if phase == "drain":
            await until(lambda: bool(victim.last_at))
            await server.client.drain(PATIENCE_SECONDS)
        await running

    async def _while_idle(self, kind: str, victim: Body) -> None:
        """Strike between requests; what is measured is how the requests after it fare."""
        server = self._server
        if kind == "no_descriptors":
            generation = server.generation
            with _no_descriptors_after_connecting():
                server.kill_engine()
                await until(lambda: server.generation > generation and server.is_ready)
            return
        generation = server.generation
        server.arm(_fault(kind, "idle"))
        body = victim if kind == GRAMMAR_CRASH else self._others[0][1]
        await run_stream(server.port, Stream(body, "idle"))
        await until(lambda: not server.is_armed)
        if kind not in ("hang", "frame_lost", "frame_doubled", "frame_corrupt"):
            await until(lambda: server.generation > generation and server.is_ready)

    async def _judge(self, others: list[Stream], victim: Stream, *, phase: str) -> tuple[Outcome, str]:
        server = self._server
        expected = self._expected["structured_outputs" in victim.body]
        if phase == "chunked_prefill":  # a prompt of its own, so that no cache had it; undisturbed now
            expected = (await run_stream(server.port, Stream(victim.body, "victim"))).said()
        for stream, (name, _, said) in zip(others, self._others, strict=True):
            if stream.said() != said:
                return Outcome.WRONG, f"a bystander ({name}): {stream.said().error or 'differs'}"
        said = victim.said() if phase != "abort" else expected
        if said != expected and not (said.error and said.is_whole and said.is_prefix_of(expected)):
            return Outcome.WRONG, f"the request in question: {said.error or 'differs'} {victim.broken}"
        if phase != "drain":
            await until(lambda: server.is_ready)
            name, body, again = self._others[0]
            if (await run_stream(server.port, Stream(body, name))).said() != again:
                return Outcome.WRONG, "the request after it"
        if not await until(lambda: not server.num_kv_blocks_held, seconds=3.0):
            return Outcome.WRONG, f"{server.num_kv_blocks_held} blocks or sequences are still held"
        return (Outcome.SURVIVED, "") if said == expected else (Outcome.FAILED_CLEANLY, said.error)


async def run_matrix(ledger: Ledger, chosen: list[tuple[str, str]]) -> None:
    """These cells once. Each drain needs a server of its own, the others share one until it is wrong."""
    whole = [phase for kind, phase in chosen if kind == API_KILL]
    if whole:
        others = [one for one in scripted_bodies(9, max_tokens=60) if one[0] in ("greedy", "n=2", "logprobs")]
        flags = scripted_flags(step_seconds=API_STEP_SECONDS)
        await asyncio.to_thread(run_api_kills, ledger, whole, flags, completions(others))
    chosen = [(kind, phase) for kind, phase in chosen if kind != API_KILL]
    drains = [(kind, phase) for kind, phase in chosen if phase == "drain"]
    rest = [(kind, phase) for kind, phase in chosen if phase != "drain"]
    while rest:
        async with serving(settings(), supervision=SUPERVISION) as server:
            matrix = Matrix(server, ledger)
            await matrix.prepare()
            while rest:
                if await matrix.trial(*rest.pop(0)) is Outcome.WRONG:
                    break
    for kind, phase in drains:
        async with serving(settings(), supervision=SUPERVISION) as server:
            matrix = Matrix(server, ledger)
            await matrix.prepare()
            await matrix.trial(kind, phase)


def _fault(kind: str, phase: str) -> Fault:
    target = TARGET if phase not in ("start", "idle", "abort") else -1
    return msgspec.convert({"kind": kind, "phase": phase, "target": target}, Fault)


def _victim(phase: str, number: int = 0, *, has_grammar: bool = False) -> Body:
    is_long = phase == "chunked_prefill"
    prompt = [3000 + position + is_long * number for position in range(900 if is_long else 20)] + [TARGET]
    body: Body = {"prompt": prompt, "max_tokens": 24, "stream": True, "ignore_eos": True, "temperature": 0.5, "seed": 4}
    return body | ({"structured_outputs": {"regex": "[a-z ]{400}"}} if has_grammar else {})


async def _leave_early(port: int, victim: Stream) -> None:
    running = asyncio.create_task(run_stream(port, victim))
    await until(lambda: bool(victim.last_at) or victim.is_done)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _no_descriptors_after_connecting() -> Iterator[None]:
    """Nothing can be opened any more; streams that are connected go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for fd in held[-4:]:  # room for the connection of the request in question
            os.close(fd)
        del held[-4:]
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
