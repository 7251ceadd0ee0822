"""Work ends with its client, whatever it does about it."""

import asyncio
import logging

import pytest
from starlette.types import Message

from app.api.disconnect import run_until_disconnect
from app.core.errors import EngineFailed


class Line:
    """The receiving end of a connection that the test closes."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def receive(self) -> Message:
        await self.closed.wait()
        return {"type": "http.disconnect"}


async def test_work_that_ends_first_is_done() -> None:
    async def work() -> None:
        return None

    assert await run_until_disconnect(Line().receive, work())


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise EngineFailed("no.")

    with pytest.raises(EngineFailed):
        await run_until_disconnect(Line().receive, work())


@pytest.mark.parametrize(("error", "is_logged"), [(EngineFailed("no."), False), (ZeroDivisionError(), True)])
async def test_work_is_cancelled_and_waited_for(
    error: Exception, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    line = Line()
    ended = False

    async def work() -> None:
        nonlocal ended
        line.closed.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended = True
            raise error from None

    with caplog.at_level(logging.ERROR, "headwater.api"):
        assert not await run_until_disconnect(line.receive, work())
    assert ended and bool(caplog.records) is is_logged


async def test_cancelling_the_caller_cancels_the_work() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    caller = asyncio.create_task(run_until_disconnect(Line().receive, work()))
    await began.wait()
    caller.cancel()
    await asyncio.wait((caller,))
    assert caller.cancelled() and ended.is_set()
