"""The process that tries grammars: `python -m app.grammar.child`, started by `app.grammar.check`.

It reads a grammar, compiles it, walks a few bytes into its language and writes its verdict, until its input
closes. The kernel kills it by SIGPROF where one grammar takes more than CPU_SECONDS of computing; where it takes too
much memory, it ends in whatever way the library takes that.
"""

import contextlib
import importlib
import resource
import signal
import struct
import sys
from random import Random
from typing import IO, TYPE_CHECKING

import msgspec

from app.core.types import Grammar
from app.grammar.errors import GrammarError, safe_message

if TYPE_CHECKING:
    from llguidance import LLMatcher

CPU_SECONDS = 0.4
"""For one grammar, of this process's own computing: how busy the machine is does not count."""
MEMORY_BYTES = 2 * 1024**3
_WALK_BYTES = 48
_LENGTH = struct.Struct("<I")


class Verdict(msgspec.Struct, frozen=True):
    """What became of a grammar."""

    grammar: Grammar | None = None
    """What the engine compiles; None: `error` says why there is nothing."""
    error: str = ""


def try_grammar(grammar: Grammar) -> Verdict:
    """Compile it and go some way into it. Bounded by the library's limits alone, not in time."""
    # Imported here, because the API process imports this module for its frames.
    from llguidance import LLTokenizer

    from app.grammar.compiler import compile_grammar, translate

    try:
        translated = translate(grammar)
        _walk(compile_grammar(translated, LLTokenizer("byte")))
    except GrammarError as error:
        return Verdict(error=str(error))
    return Verdict(translated)


def _walk(matcher: "LLMatcher") -> None:
    """Take random allowed bytes, always the same ones. Raises GrammarError where there is none or a limit is hit."""
    random = Random(0)
    for count in range(_WALK_BYTES):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            reason = safe_message(matcher.get_error())
            raise GrammarError("it allows no text" if count == 0 and "NoExtension" in reason else reason)
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        if not allowed or matcher.is_stopped():
            return
        matcher.consume_token(random.choice(allowed))


def read_frame(stream: IO[bytes]) -> bytes | None:
    """One frame; None where the stream ends."""
    header = _read_exactly(stream, _LENGTH.size)
    return None if header is None else _read_exactly(stream, _LENGTH.unpack(header)[0])


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Write one frame at once. Raises BrokenPipeError where nobody reads."""
    data = memoryview(_LENGTH.pack(len(body)) + body)
    while data:
        data = data[stream.write(data) :]


def _read_exactly(stream: IO[bytes], size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            return None
        data += part
    return data


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    importlib.import_module("app.grammar.compiler")  # on nobody's time
    with contextlib.suppress(BrokenPipeError):
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            grammar = msgspec.msgpack.decode(frame, type=Grammar)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal kills
            verdict = try_grammar(grammar)
            signal.setitimer(signal.ITIMER_PROF, 0)
            write_frame(sys.stdout.buffer, msgspec.msgpack.encode(verdict))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
