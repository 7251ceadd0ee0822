"""The API process's look at a grammar before its request is admitted.

A grammar is compiled once, over the 256 bytes in place of the model's tokens, in a process of its own that is
killed where it takes too long: whatever a grammar does to the library, it does not do it to the server. One
grammar at a time, so that a flood of hard ones makes grammars wait and nobody else. What passed lately is
remembered.
"""

import asyncio
import contextlib
import signal
import subprocess
import sys
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from threading import Timer
from typing import IO

import msgspec

from app.core.types import Grammar
from app.grammar.child import CPU_SECONDS, Verdict, read_frame, write_frame
from app.grammar.errors import GrammarError

_REMEMBERED = 256
_WALL_SECONDS = 10.0
"""For one grammar, with the start of the child: far more than its computing takes on a busy machine."""
_TOO_HARD = f"it takes more than {CPU_SECONDS:g} s of computing to compile"
_DEADLY = "the compiler of grammars does not survive it"


class GrammarChecker:
    """Belongs to the event loop's thread. Its thread and its process start with the first grammar."""

    def __init__(self, *, wall_seconds: float = _WALL_SECONDS) -> None:
        """`wall_seconds` bounds the wait for one grammar, whatever holds its process up."""
        self._process = _CheckProcess(wall_seconds)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check-grammar")
        self._passed: OrderedDict[Grammar, Grammar] = OrderedDict()
        weakref.finalize(self, self._process.close)

    async def check(self, grammar: Grammar) -> Grammar:
        """The grammar for the engine, a GBNF translated. Raises GrammarError where it cannot be served."""
        if (known := self._passed.get(grammar)) is not None:
            self._passed.move_to_end(grammar)
            return known
        verdict = await asyncio.get_running_loop().run_in_executor(self._thread, self._process.check, grammar)
        if verdict.grammar is None:
            raise GrammarError(verdict.error)
        self._passed[grammar] = verdict.grammar
        if len(self._passed) > _REMEMBERED:
            self._passed.popitem(last=False)
        return verdict.grammar


class _CheckProcess:
    """The child and its pipes. One thread calls `check`."""

    def __init__(self, wall_seconds: float) -> None:
        self._wall_seconds = wall_seconds
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar) -> Verdict:
        """Ask the child, which answers or dies within its limits; a second one where it died of anything else."""
        for _ in range(2):
            child = self._child = self._child or _spawn()
            answer = _ask(child, grammar, seconds=self._wall_seconds)
            if answer is not None:
                return answer
            self.close()
            if child.returncode == -signal.SIGPROF:
                return Verdict(error=_TOO_HARD)
        if child.returncode == -signal.SIGKILL:
            return Verdict(error=f"it was not compiled within {self._wall_seconds:g} s")
        return Verdict(error=_DEADLY)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            _pipe(child.stdin).close()
            _pipe(child.stdout).close()


def _ask(child: "subprocess.Popen[bytes]", grammar: Grammar, *, seconds: float) -> Verdict | None:
    """What the child says; None where it is gone, or is killed since it says nothing for so long."""
    watch = Timer(seconds, child.kill)
    watch.start()
    try:
        write_frame(_pipe(child.stdin), msgspec.msgpack.encode(grammar))
        answer = read_frame(_pipe(child.stdout))
    except BrokenPipeError:
        answer = None
    finally:
        watch.cancel()
    if answer is None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closed: it is ending, in its own way
            child.wait(timeout=1.0)
        return None
    return msgspec.msgpack.decode(answer, type=Verdict)


def _spawn() -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "app.grammar.child"]
    # Unbuffered: a write that met a dead child must not be tried again when the pipe is closed.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
