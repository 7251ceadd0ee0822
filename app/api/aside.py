"""Work on large bodies, off the event loop: whoever else is connected must not wait for it.

A thread that computes in Python is asked for the interpreter's lock each SWITCH_SECONDS by the loop's; one that is in a
single call of a library gives it back when that returns. So the loop waits at most for the longest call, and work
that is many steps of Python is as good as work that releases the lock.
"""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

LARGE_BYTES = 32 * 1024
"""What is read or made of so much takes about as long as to hand it to a thread and back, a few times over."""
SWITCH_SECONDS = 0.001
"""For `sys.setswitchinterval`: Python's own is five times that, and a request waits several times for the lock."""


async def aside(
    num_bytes: int, work: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """What `work` returns or raises. Where about `num_bytes` are read or made, many, it runs in a thread."""
    if num_bytes < LARGE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
