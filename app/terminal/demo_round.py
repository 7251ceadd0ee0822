"""One round of the demo: its prompts as streams, one after another or all together, watched as a client sees them.

A stream that fails keeps the text that it had; the round goes on. Times are seconds of a monotonic clock.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx

from app.terminal.demo_prompts import DemoPrompt
from app.terminal.wire import ApiError, Lines, read_line, response_error, transport_error

FINISHED = frozenset({"stop", "length"})


class Kill(NamedTuple):
    """One `kill -9` of an engine."""

    pid: int
    num_characters: int
    """Characters that all streams had received before it."""
    pause: float | None
    """Until every stream that was left had moved again; None where they ended first."""


class Outcome(NamedTuple):
    """What became of one stream."""

    text: str
    finish_reason: str | None
    error: str | None
    longest_pause: float
    """The longest wait for the first or next event."""


class Round(NamedTuple):
    """What became of all streams of a round, in the order of the prompts."""

    name: str
    outcomes: tuple[Outcome, ...]
    seconds: float
    kills: tuple[Kill, ...]

    @property
    def num_finished(self) -> int:
        return sum(outcome.error is None for outcome in self.outcomes)

    @property
    def num_characters(self) -> int:
        return sum(len(outcome.text) for outcome in self.outcomes)

    @property
    def longest_pause(self) -> float:
        return max(outcome.longest_pause for outcome in self.outcomes)

    @property
    def digest(self) -> str:
        """sha256 of the texts as a JSON list in UTF-8: no two different lists of texts read the same."""
        texts = json.dumps([outcome.text for outcome in self.outcomes], ensure_ascii=True)
        return hashlib.sha256(texts.encode()).hexdigest()


class Ask(NamedTuple):
    """How each prompt of a round is asked."""

    http: httpx.AsyncClient
    model: str
    max_tokens: int
    prompts: tuple[DemoPrompt, ...]


@dataclass
class Stream:
    """One prompt's stream as it comes."""

    text: str = ""
    num_events: int = 0
    finish_reason: str | None = None
    error: str | None = None
    longest_pause: float = 0.0
    is_over: bool = False


@dataclass
class Watch:
    """The streams of a running round. One task may wait for a change."""

    streams: tuple[Stream, ...]
    kills: list[Kill] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        return all(stream.is_over for stream in self.streams)

    @property
    def num_characters(self) -> int:
        return sum(len(stream.text) for stream in self.streams)

    def event_counts(self) -> tuple[int, ...]:
        """For `have_moved`: where the streams stand now."""
        return tuple(stream.num_events for stream in self.streams)

    def have_moved(self, since: Sequence[int]) -> bool:
        """Whether every stream that is left has had an event since."""
        return all(s.is_over or s.num_events > count for s, count in zip(self.streams, since, strict=True))

    def tell(self) -> None:
        """A stream has changed."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for the condition; False where the streams ended without it."""
        while not condition():
            if self.is_over:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True


Killer = Callable[[Watch], Coroutine[None, None, None]]
Spectator = Callable[[Watch], None]
"""Is shown each change of the streams."""


async def run_round(
    name: str, ask: Ask, *, together: bool, killer: Killer | None = None, spectator: Spectator | None = None
) -> Round:
    """Stream all prompts; with a killer beside them until they have ended."""
    watch = Watch(tuple(Stream() for _ in ask.prompts))
    started = time.monotonic()

    def on_event() -> None:
        watch.tell()
        if spectator is not None:
            spectator(watch)

    async def run(number: int) -> None:
        await _stream(ask, ask.prompts[number], into=watch.streams[number], on_event=on_event)

    killing = None if killer is None else asyncio.create_task(killer(watch))
    try:
        if together:
            await asyncio.gather(*(run(number) for number in range(len(ask.prompts))))
        else:
            for number in range(len(ask.prompts)):
                await run(number)
        seconds = time.monotonic() - started
        if killing is not None:
            await killing
    finally:
        if killing is not None:
            killing.cancel()
    outcomes = tuple(Outcome(s.text, s.finish_reason, s.error, s.longest_pause) for s in watch.streams)
    return Round(name, outcomes, seconds, tuple(watch.kills))


async def _stream(ask: Ask, prompt: DemoPrompt, *, into: Stream, on_event: Callable[[], None]) -> None:
    try:
        await _read(ask, prompt, into=into, on_event=on_event)
        if into.finish_reason not in FINISHED:
            into.error = f"the stream ended with the finish reason {into.finish_reason!r}"
    except httpx.HTTPError as error:
        into.error = str(transport_error(str(ask.http.base_url).rstrip("/"), error))
    except ApiError as error:
        into.error = str(error)
    finally:
        into.is_over = True
        on_event()


async def _read(ask: Ask, prompt: DemoPrompt, *, into: Stream, on_event: Callable[[], None]) -> None:
    body = {"model": ask.model, "prompt": prompt.text, "max_tokens": ask.max_tokens, "stream": True}
    body |= {"temperature": prompt.temperature, "top_p": prompt.top_p, "seed": prompt.seed}
    last = time.monotonic()
    async with ask.http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise response_error(response)
        lines = Lines()
        async for data in response.aiter_bytes():
            for delta in filter(None, map(read_line, lines.push(data))):
                now = time.monotonic()
                into.longest_pause, last = max(into.longest_pause, now - last), now
                into.text += delta.text
                into.finish_reason = delta.finish_reason or into.finish_reason
                into.num_events += 1
                on_event()
