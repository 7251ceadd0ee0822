"""`headwater demo`: the same seeded prompts alone, together, and together while engines are killed.

Three rounds over the public API, one sha256 over the texts of each. On a server whose rows are independent
the three are equal, whatever is killed; elsewhere the demo says that nothing of the kind is promised.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.status import Status

from app.terminal.child import own_server
from app.terminal.demo_kill import engine_given, engine_of, kill_engine, make_killer, why_not_killable
from app.terminal.demo_prompts import DemoPrompt, demo_prompts
from app.terminal.demo_report import Verdict, judge, show_head, show_round, show_sample, show_verdict
from app.terminal.demo_round import Ask, Killer, Round, Watch, run_round
from app.terminal.wire import Api, Model, client_options

NUM_KILLS = 5


class DemoOptions(NamedTuple):
    """What the demo is asked to do. The defaults are the demo; tests are shorter."""

    url: str | None = None
    """None starts a server of its own."""
    model: str | None = None
    pid: int | None = None
    """The engine of a server that does not name it."""
    key: str | None = None
    max_tokens: int = 64
    num_kills: int = NUM_KILLS
    kill_seed: int = 0
    prompts: tuple[DemoPrompt, ...] = demo_prompts()
    serve_arguments: Sequence[str] = ()


class DemoResult(NamedTuple):
    """What was seen."""

    rounds: tuple[Round, ...]
    verdict: Verdict


def run_demo(options: DemoOptions, *, console: Console, progress: Console) -> DemoResult:
    """Run all rounds, print them to `console` as they end. Raises ApiError where there is no server to speak to."""
    with ExitStack() as stack:
        url = options.url
        start = "starting `headwater serve` (the first time it fetches the model)" if url is None else f"asking {url}"
        status = stack.enter_context(progress.status(start))
        if url is None:
            url = stack.enter_context(own_server(model=options.model, arguments=options.serve_arguments))
        with Api(url, key=options.key) as api:
            target = _look_at(api, options)
        show_head(console, _head(target, options))
        rounds = asyncio.run(_run_rounds(target, options, console=console, status=status))
    verdict = judge(rounds, is_promised=target.is_promised)
    show_verdict(console, rounds, verdict, notes=_notes(target))
    if not verdict.errors and not verdict.differences:
        show_sample(console, options.prompts[0].text, rounds[0].outcomes[0].text)
    return DemoResult(rounds, verdict)


class _Target(NamedTuple):
    """The server, as it describes itself."""

    url: str
    model: Model
    why_no_kills: str | None

    @property
    def is_promised(self) -> bool:
        return self.model.row_independent is True


def _look_at(api: Api, options: DemoOptions) -> _Target:
    model = api.choose_model(options.model if options.url is not None else None)
    return _Target(api.url, model, _why_no_kills(api, options))


def _why_no_kills(api: Api, options: DemoOptions) -> str | None:
    if options.pid is not None:
        return None
    ready = api.ready()
    if ready is None or ready.engine_pid is None:
        return "its /ready names no engine; --pid would"
    return why_not_killable(api.url, ready.engine_pid)


def _head(target: _Target, options: DemoOptions) -> tuple[str, ...]:
    model = target.model
    what = " on ".join(filter(None, (model.tier, model.device)))
    names = filter(None, (model.id, what, target.url))
    return (
        f"{len(options.prompts)} prompts with seeds, greedy and sampled, up to {options.max_tokens} tokens each",
        " · ".join(names),
    )


def _notes(target: _Target) -> tuple[str, ...]:
    notes = []
    if not target.is_promised:
        notes.append("Equality is not promised: /v1/models does not say that rows are independent.")
    if target.why_no_kills is not None:
        notes.append(f"No engine was killed: {target.why_no_kills}.")
    return tuple(notes)


async def _run_rounds(target: _Target, options: DemoOptions, *, console: Console, status: Status) -> tuple[Round, ...]:
    rounds: list[Round] = []
    async with httpx.AsyncClient(**client_options(target.url, key=options.key)) as http:
        ask = Ask(http, target.model.id, options.max_tokens, options.prompts)

        async def run(name: str, *, together: bool, killer: Killer | None = None) -> None:
            spectator = _spectator(status, name, num_prompts=len(options.prompts))
            done = await run_round(name, ask, together=together, killer=killer, spectator=spectator)
            rounds.append(done)
            show_round(console, done)

        await run("one after another", together=False)
        await run("all together", together=True)
        if target.why_no_kills is None:
            find = engine_of(http) if options.pid is None else engine_given(options.pid)
            num_kills = options.num_kills if options.pid is None else 1
            killer = make_killer(
                find,
                partial(kill_engine, url=target.url, is_given=options.pid is not None),
                num_kills=num_kills,
                num_characters=rounds[0].num_characters,
                seed=options.kill_seed,
            )
            await run(f"together, {num_kills} × kill -9", together=True, killer=killer)
    return tuple(rounds)


def _spectator(status: Status, name: str, *, num_prompts: int) -> Callable[[Watch], None]:
    def show(watch: Watch) -> None:
        over = sum(stream.is_over for stream in watch.streams)
        kills = f", {len(watch.kills)} engines killed" if watch.kills else ""
        status.update(f"{name}: {watch.num_characters:,} characters, {over} of {num_prompts} finished{kills}")

    return show
