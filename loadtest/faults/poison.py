"""One request that ends every engine that computes it, among others that must not notice more than a pause."""

import asyncio

from app.client.settings import Supervision
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.server import scripted_settings, serving, until
from loadtest.faults.streams import Stream, make_oracle, run_stream, scripted_bodies
from loadtest.faulty_engine import Fault, Kind, Phase

MAX_DEATHS = 3
TARGET = 777
SUPERVISION = Supervision(hang_seconds=1.0, unknown_step_seconds=0.1, unknown_token_seconds=0.0, tick_seconds=0.1)


async def run_poison(ledger: Ledger, *, kind: Kind, phase: Phase, num_others: int) -> None:
    """One trial."""
    async with serving(scripted_settings(step_seconds=0.01), supervision=SUPERVISION) as server:
        bodies = [
            each for each in scripted_bodies(num_others + num_others // 4, max_tokens=120) if each[0] != "unseeded"
        ]
        oracle = await make_oracle(server.port, bodies[:num_others])
        server.arm(Fault(kind, phase, target=TARGET, repeat=True))
        others = [Stream(body, name) for name, body, _ in oracle]
        tasks = [asyncio.create_task(run_stream(server.port, stream)) for stream in others]
        await until(lambda: all(stream.last_at for stream in others))
        body: dict[str, object] = {"prompt": [5, 6, TARGET], "max_tokens": 30, "stream": True}
        more: dict[str, object] = {"ignore_eos": True}
        if phase == "prepare":
            more = {"structured_outputs": {"regex": "[a-z ]+"}}
        poison = Stream(body | more, "poison")
        await run_stream(server.port, poison)
        await asyncio.gather(*tasks)
        num_deaths = server.generation - 1
        failed = [s.kind for s, (_, _, said) in zip(others, oracle, strict=True) if s.said() != said]
        said = poison.said()
        is_right = not failed and num_deaths <= MAX_DEATHS and "quarantine" in said.error and said.is_whole
        ledger.add(
            "poison",
            f"{kind} in {phase}",
            Outcome.FAILED_CLEANLY if is_right else Outcome.WRONG,
            detail="" if is_right else f"{num_deaths} deaths, others that failed: {failed}, poison: {said.error}",
            deaths=float(num_deaths),
            others=float(num_others),
        )
