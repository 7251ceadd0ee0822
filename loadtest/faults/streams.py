"""Streams of many kinds over raw sockets, and what they said in a form that can be compared.

The client is a few lines on purpose: it stamps bytes as they arrive and parses when the stream is over, so that
64 of them cost little beside the server under test.
"""

import asyncio
import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]

ENGLISH = (
    "The history of lighthouses begins",
    "Write a short letter to a friend about the sea.",
    "A list of things to pack for a week in the mountains:\n1.",
    "Once upon a time there was a small robot who",
)
CHINESE = ("今天天气很好，我们一起去", "请用中文介绍一下北京的历史：", "人工智能的发展")


@dataclass
class Stream:
    """One request: what arrived, when, and what it said in the end."""

    body: Body
    kind: str
    status: int = 0
    seed: str = ""
    raw: bytearray = field(default_factory=bytearray)
    last_at: float = 0.0
    """When bytes with an event arrived last."""
    is_done: bool = False
    broken: str = ""
    """Why the connection ended without the end of the response; empty where it did not."""

    def said(self) -> "Said":
        """Parse it."""
        return Said.of(self)


@dataclass(frozen=True)
class Said:
    """Texts, log-probabilities and finish reasons by choice; the error, if the stream had one."""

    choices: tuple[tuple[str, str, str], ...]
    """(text, logprobs as JSON, finish reason) of each choice."""
    error: str = ""
    is_whole: bool = False
    """It ended as the protocol demands: [DONE], or an error body with its status."""

    @staticmethod
    def of(stream: Stream) -> "Said":
        payload = dechunk(bytes(stream.raw))
        if stream.status != 200:
            return _refused(payload)
        texts: dict[int, str] = {}
        logprobs: dict[int, list[Any]] = {}
        reasons: dict[int, str] = {}
        error, is_whole = "", False
        for event in payload.decode("utf-8", "strict").split("\n\n"):
            if event == "data: [DONE]":
                is_whole = True
            elif event.startswith("data: "):
                chunk = json.loads(event[6:])
                error = error or str(chunk.get("error", {}).get("message", ""))
                for choice in chunk.get("choices", ()):
                    index = choice["index"]
                    texts[index] = texts.get(index, "") + choice["text"]
                    if choice.get("logprobs"):
                        logprobs.setdefault(index, []).append(choice["logprobs"])
                    if choice.get("finish_reason"):
                        reasons[index] = reasons.get(index, "") + choice["finish_reason"]
        choices = tuple(
            (texts[index], _joined(logprobs.get(index, [])), reasons.get(index, "")) for index in sorted(texts)
        )
        return Said(choices, error, is_whole)

    def is_prefix_of(self, other: "Said") -> bool:
        """Nothing that was said is wrong, as far as it goes."""
        return len(self.choices) <= len(other.choices) and all(
            other.choices[index][0].startswith(choice[0]) for index, choice in enumerate(self.choices)
        )


def _refused(payload: bytes) -> Said:
    try:
        message = str(json.loads(payload)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return Said((), error=f"no error body: {payload[:200]!r}")
    return Said((), error=message, is_whole=True)


def _joined(parts: list[Any]) -> str:
    """Log-probabilities whatever the chunks were: concatenated lists, as JSON with all digits."""
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return json.dumps([[entry for part in parts for entry in (part.get(key) or ())] for key in keys])


def dechunk(raw: bytes) -> bytes:
    """The payload of a response body with chunked coding, or the body as it is."""
    if not raw[:1].isalnum() or b"\r\n" not in raw[:20]:
        return raw
    parts: list[bytes] = []
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            break
        parts.append(rest[:length])
        raw = rest[length + 2 :]
    return b"".join(parts)


async def run_stream(port: int, stream: Stream) -> Stream:
    """Send the request and read the response to its end. Never raises for what the server does."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        stream.broken, stream.is_done = str(error), True
        return stream
    try:
        content = json.dumps(stream.body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        head += f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await _read(reader, stream)
    except (OSError, asyncio.IncompleteReadError) as error:
        stream.broken = f"{type(error).__name__}: {error}"
    finally:
        stream.is_done = True
        writer.close()
    return stream


async def _read(reader: asyncio.StreamReader, stream: Stream) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    stream.status = int(head.split(" ", 2)[1])
    for line in head.split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "headwater-seed":
            stream.seed = value.strip()
    while data := await reader.read(65536):
        stream.raw += data
        if b"data: " in data:
            stream.last_at = time.monotonic()


def scripted_bodies(count: int, *, max_tokens: int, first_token: int = 1000) -> list[tuple[str, Body]]:
    """Requests by token ids, of all kinds, prompts of 3 to about 90 tokens."""
    bodies: list[tuple[str, Body]] = []
    for index, kind in zip(range(count), itertools.cycle(KINDS), strict=False):
        prompt = [first_token + (index * 131 + position * 7) % 40_000 for position in range(3 + (index * 11) % 90)]
        bodies.append((kind, _body(kind, prompt, index, max_tokens=max_tokens)))
    return bodies


def text_bodies(count: int, *, max_tokens: int) -> list[tuple[str, Body]]:
    """Requests in words, of all kinds, for a model that reads."""
    bodies: list[tuple[str, Body]] = []
    for index, kind in zip(range(count), itertools.cycle(KINDS), strict=False):
        texts = CHINESE if kind == "chinese" else ENGLISH
        prompt = f"{texts[index % len(texts)]} {index}:"
        bodies.append((kind, _body(kind, prompt, index, max_tokens=max_tokens)))
    return bodies


ORACLE_CONCURRENCY = 64
KINDS = ("greedy", "seeded", "stop", "n=2", "logprobs", "chinese", "penalties", "min_tokens", "unseeded")


def _body(kind: str, prompt: object, index: int, *, max_tokens: int) -> Body:
    body: Body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    special: dict[str, Body] = {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": index},
        "stop": {"temperature": 0.7, "seed": index},
        "n=2": {"temperature": 0.9, "seed": index, "n": 2},
        "logprobs": {"temperature": 0.8, "seed": index, "logprobs": 3},
        "chinese": {"temperature": 0.7, "seed": index},
        "penalties": {"temperature": 0.8, "seed": index, "presence_penalty": 0.6, "repetition_penalty": 1.2},
        "min_tokens": {"temperature": 0.8, "seed": index, "min_tokens": max_tokens // 2, "ignore_eos": False},
        "unseeded": {"temperature": 1.0},
    }
    return body | special[kind]


async def make_oracle(port: int, bodies: list[tuple[str, Body]]) -> list[tuple[str, Body, Said]]:
    """What each request says where nothing interrupts it. Stop strings are cut from what the model says."""
    few = asyncio.Semaphore(ORACLE_CONCURRENCY)

    async def undisturbed(kind: str, body: Body) -> Said:
        async with few:
            said = (await run_stream(port, Stream(body, kind))).said()
        if said.error or not said.is_whole:
            raise RuntimeError(f"the undisturbed run of {kind} failed: {said.error}")
        return said

    async def one(kind: str, body: Body) -> tuple[str, Body, Said]:
        if kind == "unseeded":
            return kind, body, Said(())
        said = await undisturbed(kind, body)
        if kind == "stop":
            text = said.choices[0][0]
            middle = len(text) * 2 // 3
            body = body | {"stop": [text[middle : middle + 5] or "\n"]}
            said = await undisturbed(kind, body)
        return kind, body, said

    return list(await asyncio.gather(*(one(kind, body) for kind, body in bodies)))
