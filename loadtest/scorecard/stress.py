"""The checks that hurt: too many requests, a process that is stopped, a process that is killed.

The last one may leave nothing that listens: it runs last.
"""

import asyncio
import os
import signal
import time
from statistics import median

from loadtest.scorecard.finding import Finding, Verdict
from loadtest.scorecard.target import Answer, Target

NUM_STREAMS = 16
NUM_OVERLOAD = 1500
STOPPED_SECONDS = 12.0
REFUSALS = (429, 503)


async def overload_is_refused_well(target: Target) -> Finding:
    """Many more requests at once than can run: each is answered in full, or refused at once with Retry-After."""

    async def one(index: int) -> Answer:
        return await target.post(target.body(f"Count to {index}:", 2), timeout=180.0)

    answers = await asyncio.gather(*(one(index) for index in range(NUM_OVERLOAD)))
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status in REFUSALS]
    well = [answer for answer in refused if "retry-after" in answer.headers]
    lost = len(answers) - len(served) - len(refused)
    detail = f"{len(served)} served, {len(refused)} refused"
    if refused:
        detail += f" ({len(well)} with Retry-After, median {median(a.seconds for a in refused):.2f} s)"
    if lost:
        return Finding("overload", Verdict.FAIL, f"{detail}, {lost} lost without an answer")
    if await target.answers_within(30.0) is None:
        return Finding("overload", Verdict.FAIL, f"{detail}; no answers afterwards")
    return Finding("overload", Verdict.PASS if len(well) == len(refused) else Verdict.PARTLY, detail)


async def a_stop_is_noticed(target: Target) -> Finding:
    """The process with the model is stopped under streams: health says so, or the streams go on."""
    pid = target.model_pid()
    if pid is None:
        return Finding("hang", Verdict.NOT_RUN, "needs --pid")
    streams = [asyncio.create_task(_long_stream(target, index)) for index in range(4)]
    await asyncio.sleep(1.0)
    noticed = None
    async with target.stopped(pid):
        began = time.monotonic()
        while time.monotonic() - began < STOPPED_SECONDS and noticed is None:
            if not await _is_green(target):
                noticed = time.monotonic() - began
            await asyncio.sleep(0.2)
        await asyncio.sleep(max(0.0, began + STOPPED_SECONDS - time.monotonic()))
        is_replaced = target.model_pid() != pid
    answers = await asyncio.gather(*streams)
    whole = sum(answer.is_whole for answer in answers)
    if noticed is None:
        return Finding(
            "hang", Verdict.FAIL, f"health green all {STOPPED_SECONDS:.0f} s; {whole} of 4 streams ended well"
        )
    how = "replaced it" if is_replaced else "waited for it"
    verdict = Verdict.PASS if is_replaced and whole == 4 else Verdict.PARTLY
    return Finding("hang", verdict, f"noticed after {noticed:.1f} s, {how}; {whole} of 4 streams ended well")


async def a_kill_is_survived(target: Target) -> Finding:
    """`kill -9` of the process with the model under 16 streams: none is lost, none differs."""
    pid = target.model_pid()
    if pid is None:
        return Finding("kill -9", Verdict.NOT_RUN, "needs --pid")
    undisturbed = await asyncio.gather(*(_long_stream(target, index) for index in range(NUM_STREAMS)))
    streams = [asyncio.create_task(_long_stream(target, index)) for index in range(NUM_STREAMS)]
    await asyncio.sleep(max(0.3, min(answer.seconds for answer in undisturbed) / 2))
    os.kill(pid, signal.SIGKILL)
    answers = await asyncio.gather(*streams)
    whole = [answer for answer in answers if answer.is_whole]
    same = sum(a.is_whole and a.text == b.text for a, b in zip(answers, undisturbed, strict=True))
    back = await target.answers_within(60.0)
    pause = f", longest pause {max(answer.longest_pause for answer in whole):.1f} s" if whole else ""
    after = "answers again" if back is not None else "answers no more"
    verdict = Verdict.PASS if same == NUM_STREAMS and back is not None else Verdict.FAIL
    detail = f"{len(whole)} of {NUM_STREAMS} streams ended well, {same} with the same text{pause}; {after}"
    return Finding("kill -9", verdict, detail)


async def _long_stream(target: Target, index: int) -> Answer:
    return await target.stream(f"Tell a long story about the number {index}.", 160, timeout=120.0, ignore_eos=True)


async def _is_green(target: Target) -> bool:
    """Every health route that the server has says yes."""
    for path in ("/health", "/ready"):
        response = await target.get(path, timeout=2.0)
        if response is None or response.status_code not in (200, 404):
            return False
    return True
