"""What servers like this one have been brought down by, and the largest legal request of each kind, one at a time.

Each is sent to a `headwater serve` while /health is asked without pause. Told are the status, the longest stall of
the event loop as the server itself saw it (`loadtest.watched_server`), the longest wait of a probe, by how much the
client itself was late, and the peak of the API process's memory. A row survives where the status is one of those
expected, every probe is answered, and an ordinary request afterwards says what it said before.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.faults.crowd import served
from loadtest.faults.ledger import Ledger, Outcome
from loadtest.faults.replicas import Replica
from loadtest.watched_server import read_stalls

MAX_STALL = 0.020
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
_SECONDS = 60.0
_PAUSE = 0.002


class Attack(msgspec.Struct, frozen=True):
    """One request."""

    name: str
    path: str
    body: bytes
    statuses: tuple[int, ...]
    """What it may be answered."""
    head: str = ""
    """Further header lines."""


async def run_attacks(ledger: Ledger, *, flags: Sequence[str], names: Sequence[str] = ()) -> None:
    """Each once, or those of `names`."""
    for attack in attacks():
        if names and attack.name not in names:
            continue
        # A server of its own for each: a peak is a peak of this one.
        with tempfile.TemporaryDirectory(prefix="attacks-") as scratch:
            stalls = Path(scratch) / "stalls.jsonl"
            async with served(*flags, stalls=stalls) as server:
                await _try(ledger, server, attack, stalls=stalls)


def attacks() -> list[Attack]:
    """The largest legal ones first."""
    text = "a b " * 470_000
    ids = [100 + index % 900 for index in range(400_000)]
    scored = {"prompt": ids[:8000], "max_tokens": 1, "prompt_logprobs": 20}
    say = [{"role": "user", "content": "Hi"}]
    wide = {f"p{index}": {"type": "string", "maxLength": 5} for index in range(2000)}
    tools = [
        {"type": "function", "function": {"name": f"f{index}", "description": "d" * 6000, "parameters": {}}}
        for index in range(64)
    ]
    return [
        _legal("the longest text as a prompt", COMPLETIONS, {"prompt": text, "max_tokens": 1}),
        _legal("the longest text in a chat", CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
        _legal("the most messages", CHAT, {"messages": say * 40_000, "max_tokens": 1}),
        _legal("the most token ids", COMPLETIONS, {"prompt": ids, "max_tokens": 1}),
        _legal("the most allowed ids", COMPLETIONS, {"prompt": "a", "max_tokens": 1, "allowed_token_ids": ids}),
        _legal("log-probabilities of 8,000 tokens, 20 at each", COMPLETIONS, scored),
        _legal("the most messages of Anthropic's form", MESSAGES, {"messages": say * 40_000, "max_tokens": 1}),
        _legal("the most messages to count", COUNT, {"messages": say * 40_000}),
        _legal("the most items", RESPONSES, {"input": say * 40_000, "max_output_tokens": 1}),
        _legal("1,024 prompts", COMPLETIONS, {"prompt": ["a b c " * 300] * 1024, "max_tokens": 1}),
        _legal("1,024 choices", COMPLETIONS, {"prompt": "a", "n": 1024, "max_tokens": 1}),
        _legal("64 tools, one of them forced", CHAT, _with(say, tools=tools, tool_choice="required")),
        _legal("the longest text to tokenize", TOKENIZE, {"prompt": text, "return_token_strs": True}),
        _legal("the most ids to detokenize", DETOKENIZE, {"tokens": ids}),
        _bad("100,000 unknown fields", CHAT, {"messages": say} | {f"x{index}": 1 for index in range(100_000)}),
        _bad(
            "a schema of 2,000 properties",
            COMPLETIONS,
            {"prompt": "a", "max_tokens": 1, "structured_outputs": {"json": {"type": "object", "properties": wide}}},
            200,
        ),
        _bad("nesting of 100,000", COMPLETIONS, b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        _bad("a schema of 13 levels of oneOf, 0.5 MB", COMPLETIONS, _one_of(), 200),
        _bad("an expression of counted repeats", COMPLETIONS, _regex("(((a{1,1000}){1,1000}){1,1000})"), 200),
        _bad("a malformed tool", CHAT, {"messages": say, "tools": [{"type": "function", "function": {"name": 5}}]}),
        _bad("tokenize in the template's kwargs", CHAT, _with(say, chat_template_kwargs={"tokenize": True}), 200),
        _bad("a template of the client's", CHAT, _with(say, chat_template="{{ x }}"), 200),
        _bad("an address to fetch an image from", CHAT, {"messages": [_image()]}),
        _bad("n of 16,384", COMPLETIONS, {"prompt": "a", "n": 16_384}),
        Attack("a body of 64 MiB", COMPLETIONS, b" " * (64 << 20), (413,)),
        Attack("a header of 4 MiB", COMPLETIONS, b"{}", (431,), "x-big: " + "a" * (4 << 20) + "\r\n"),
        Attack("60,000 headers", COMPLETIONS, b"{}", (431,), "".join(f"a{index}:\r\n" for index in range(60_000))),
    ]


def _with(messages: list[dict[str, str]], **fields: object) -> dict[str, object]:
    return {"messages": messages, "max_tokens": 1, **fields}


def _legal(name: str, path: str, body: object) -> Attack:
    return Attack(f"legal: {name}", path, msgspec.json.encode(body), (200,))


def _bad(name: str, path: str, body: object, *more: int) -> Attack:
    return Attack(name, path, body if isinstance(body, bytes) else msgspec.json.encode(body), (400, *more))


def _one_of(depth: int = 13) -> dict[str, object]:
    """Twice as large with each level."""
    schema: dict[str, object] = {"const": 1}
    for level in range(depth):
        schema = {"oneOf": [schema, {"type": "object", "properties": {f"k{level}": schema}}]}
    return {"prompt": "a", "max_tokens": 1, "structured_outputs": {"json": schema}}


def _regex(pattern: str) -> dict[str, object]:
    return {"prompt": "a", "max_tokens": 1, "structured_outputs": {"regex": pattern}}


def _image() -> dict[str, object]:
    url = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    return {"role": "user", "content": [url]}


async def _try(ledger: Ledger, server: Replica, attack: Attack, *, stalls: Path) -> None:
    ordinary = msgspec.json.encode({"prompt": "a", "max_tokens": 4, "temperature": 0, "ignore_eos": True})
    _, before = await _send(server.port, COMPLETIONS, ordinary)
    waits: list[float] = []
    lags: list[float] = []
    watching = [asyncio.create_task(_watch(server.port, waits)), asyncio.create_task(_lag(lags))]
    await asyncio.sleep(0.3)
    base, began = max(waits, default=0.0), len(waits)
    start = time.monotonic()
    status, answer = await _send(server.port, attack.path, attack.body, attack.head)
    seconds = time.monotonic() - start
    await asyncio.sleep(0.2)
    for task in watching:
        task.cancel()
    _, after = await _send(server.port, COMPLETIONS, ordinary)
    wait, lag = max(waits[began:], default=0.0), max(lags, default=0.0)
    seen = list(read_stalls(stalls, since=start))
    stall = max((one.own for one in seen), default=0.0)
    said_before, said_after = (msgspec.json.decode(body).get("choices", body) for body in (before, after))
    problems = [
        *([f"answered {status}: {answer[:160]!r}"] if status not in attack.statuses else []),
        *(["an ordinary request is answered otherwise afterwards"] if said_before != said_after else []),
    ]
    slow = f"the event loop stood still for {1e3 * stall:.0f} ms, the aim is 20 ms" if stall > MAX_STALL else ""
    ledger.add(
        "attacks",
        attack.name,
        Outcome.WRONG if problems else Outcome.SURVIVED,
        count=1,
        detail="; ".join(problems) or slow,
        status=status,
        seconds=seconds,
        longest_stall_ms=1e3 * stall,
        longest_stall_beside_others_ms=1e3 * max((one.late for one in seen), default=0.0),
        longest_probe_ms=1e3 * wait,
        probe_before_ms=1e3 * base,
        client_late_ms=1e3 * lag,
        peak_mib=server.peak_mib,
    )


async def _send(port: int, path: str, body: bytes, more: str = "") -> tuple[int, bytes]:
    """Status and body; 0 where the connection ended without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    head += f"{more}content-length: {len(body)}\r\n\r\n"

    async def write() -> None:
        try:
            writer.write(head.encode())
            for start in range(0, len(body), 1 << 16):
                writer.write(body[start : start + (1 << 16)])
                await writer.drain()
        except OSError:
            pass  # refused before all of it was sent

    writing = asyncio.create_task(write())
    answer = b""
    try:
        async with asyncio.timeout(_SECONDS):
            while part := await reader.read(1 << 20):
                answer += part
    except (OSError, TimeoutError):
        pass  # reset behind the answer, or none
    finally:
        writing.cancel()
        writer.close()
    first, _, rest = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]) if first.startswith(b"HTTP/1.1 ") else 0, rest


async def _watch(port: int, waits: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            began = time.monotonic()
            writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            await reader.readuntil(b'"ok"}')
            waits.append(time.monotonic() - began)
            await asyncio.sleep(_PAUSE)
    finally:
        writer.close()


async def _lag(lags: list[float]) -> None:
    while True:
        began = time.monotonic()
        await asyncio.sleep(_PAUSE)
        lags.append(time.monotonic() - began - _PAUSE)
