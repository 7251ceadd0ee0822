"""Work that ends when its client does."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive

from app.api.errors import is_expected

_logger = logging.getLogger("headwater.api")


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work`; cancel it as soon as the client closes the connection. True: it ran to its end.

    The body must have been read: `receive` belongs to this function meanwhile. Exceptions of `work` are
    raised, unless the client is gone.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        await _end(task)
        await _end(watcher)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Task[None]) -> None:
    if task.done():
        return
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        error = task.exception()
        if isinstance(error, Exception) and not is_expected(error):
            _logger.error("A request failed after its client had gone.", exc_info=error)
