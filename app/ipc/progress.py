"""The progress page: a small memfd that the engine writes and the API process reads without a message.

It says what the engine is doing right now: hang detection and blame read it when the engine cannot
answer any more, even after its death. The page is an array of 64-bit words:

    0 version        odd while the writer is inside; two more with each write
    1 checksum       sum of the words from 2 on that are in use, modulo 2^64
    2 generation     3 state          4 step id        5 monotonic ns of the last write
    6 tokens         7 requests       8.. request keys
    last             key of the request whose grammar is being prepared, 0 for none

Words 6 and up describe the running step. A request key is 64 bits of a hash of its id, as long as there
is room for them; word 7 counts all. The clock is CLOCK_MONOTONIC, the same in both processes. The last word
stands by itself: the thread that prepares grammars writes it whenever it likes, in one store.

Readers take a copy and accept it where its version is even and its checksum fits: a torn copy is not
believed, also on processors that reorder stores.
"""

import mmap
import os
import time
from collections.abc import Sequence
from enum import IntEnum
from hashlib import blake2b

import msgspec

PAGE_BYTES = 16 * 1024
_HEADER_WORDS = 8
_PREPARING_WORD = PAGE_BYTES // 8 - 1
MAX_REQUEST_KEYS = _PREPARING_WORD - _HEADER_WORDS
_MASK = (1 << 64) - 1
_READ_ATTEMPTS = 64


class EnginePhase(IntEnum):
    """What the engine's one thread is doing."""

    UNBORN = 0
    """Nothing was written yet: the interpreter is starting."""
    LOADING = 1
    IDLE = 2
    STEPPING = 3
    BLOCKED = 4
    """Not stepping because the API process does not read what was sent."""
    PREPARING = 5
    """Not stepping because all that is live waits for its grammar; written anew while that goes on."""


class Progress(msgspec.Struct, frozen=True):
    """One consistent reading of the page."""

    generation: int
    phase: EnginePhase
    step_id: int
    written_ns: int
    """CLOCK_MONOTONIC at the last write; while STEPPING, the start of the step."""
    num_tokens: int
    num_requests: int
    request_keys: tuple[int, ...]
    """Keys of the requests in the running step, the first MAX_REQUEST_KEYS of them."""
    preparing_key: int | None = None
    """Of the request whose grammar is being prepared, beside the step."""

    @property
    def keys_at_work(self) -> tuple[int, ...]:
        """Of the requests that are computed at this moment, in the step or beside it, each once."""
        keys = self.request_keys if self.phase is EnginePhase.STEPPING else ()
        if self.preparing_key is None or self.preparing_key in keys:
            return keys
        return (*keys, self.preparing_key)


def request_key(request_id: str) -> int:
    """64 bits that stand for a request id on the page."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little")


def create_page() -> int:
    """A new page, zeroed; returns its file descriptor, which children do not inherit by themselves."""
    fd = os.memfd_create("headwater-progress", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE_BYTES)
    return fd


class ProgressWriter:
    """The engine's side of the page."""

    def __init__(self, fd: int, *, generation: int = 0) -> None:
        self._words = memoryview(mmap.mmap(fd, PAGE_BYTES)).cast("Q")
        self._generation = generation
        self._step_id = 0

    def set_generation(self, generation: int) -> None:
        self._generation = generation

    def set_phase(self, phase: EnginePhase) -> None:
        """No step is running; the step id stays that of the last one."""
        self._write((self._generation, phase, self._step_id, time.monotonic_ns(), 0, 0))

    def begin_step(self, step_id: int, *, num_tokens: int, request_keys: Sequence[int]) -> None:
        """A step begins now with these requests."""
        self._step_id = step_id
        header = (self._generation, EnginePhase.STEPPING, step_id, time.monotonic_ns(), num_tokens, len(request_keys))
        self._write((*header, *request_keys[:MAX_REQUEST_KEYS]))

    def note_preparing(self, request_key: int | None) -> None:
        """The grammar of this request is prepared from now on, None: no grammar is. Any one thread may say so."""
        self._words[_PREPARING_WORD] = request_key or 0

    def _write(self, values: tuple[int, ...]) -> None:
        words = self._words
        version = words[0] | 1
        words[0] = version
        for index, value in enumerate(values, start=2):
            words[index] = value
        words[1] = sum(values) & _MASK
        words[0] = (version + 1) & _MASK


class ProgressReader:
    """The API process's side of the page; readable until closed, whatever became of the engine."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES, prot=mmap.PROT_READ)

    def read(self) -> Progress | None:
        """The page's content; None where a writer was inside all the time (a writer that died there stays)."""
        for _ in range(_READ_ATTEMPTS):
            words = memoryview(self._map[:]).cast("Q")
            if not words[0] & 1 and (progress := _parse(words)) is not None:
                return progress
        return None

    def close(self) -> None:
        self._map.close()


def _parse(words: memoryview) -> Progress | None:
    generation, phase, step_id, written_ns, num_tokens, num_requests = words[2:_HEADER_WORDS]
    end = _HEADER_WORDS + min(num_requests, MAX_REQUEST_KEYS)
    if sum(words[2:end]) & _MASK != words[1] or phase > max(EnginePhase):
        return None
    return Progress(
        generation=generation,
        phase=EnginePhase(phase),
        step_id=step_id,
        written_ns=written_ns,
        num_tokens=num_tokens,
        num_requests=num_requests,
        request_keys=tuple(words[_HEADER_WORDS:end]),
        preparing_key=words[_PREPARING_WORD] or None,
    )
