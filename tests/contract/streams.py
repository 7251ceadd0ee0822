"""A stream's events with their cursors, and what they say together, however it was divided into events."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.contract.serving import Running

Body = dict[str, Any]


@dataclass
class Event:
    """One event that is not a comment."""

    id: str
    data: str

    @property
    def chunk(self) -> dict[str, Any]:
        decoded: dict[str, Any] = {} if self.data == "[DONE]" else json.loads(self.data)
        return decoded


@dataclass
class Choice:
    """Of one choice, all that its events said; each part in its order."""

    openings: list[str] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    ends: list[tuple[str, Any]] = field(default_factory=list)
    prompt_token_ids: list[list[int]] = field(default_factory=list)
    num_counted: int | None = None
    """Completion tokens that the choice's own usage told last."""


@dataclass
class Said:
    """A whole stream."""

    choices: dict[int, Choice] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    created: set[int] = field(default_factory=set)
    fingerprints: set[str] = field(default_factory=set)
    usage: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    num_ends: int = 0


def events_of(response: httpx.Response) -> list[Event]:
    """Of a response that must be a stream."""
    assert response.status_code == 200, response.text
    return parse_events(response.text)


def parse_events(text: str) -> list[Event]:
    """The events; one that is not whole is none."""
    found = []
    for part in text.split("\n\n")[:-1]:
        lines = [line for line in part.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        fields = dict(line.split(": ", 1) for line in lines)
        assert set(fields) <= {"id", "data"}, part
        found.append(Event(fields.get("id", ""), fields["data"]))
    return found


def said(events: list[Event]) -> Said:
    """What the events say together."""
    whole = Said()
    for event in events:
        if event.data == "[DONE]":
            whole.num_ends += 1
            continue
        chunk = event.chunk
        if "error" in chunk:
            whole.errors.append(chunk["error"])
            continue
        whole.ids.add(chunk["id"])
        whole.created.add(chunk["created"])
        whole.fingerprints.add(chunk["system_fingerprint"])
        if chunk.get("usage") and not chunk["choices"]:
            whole.usage.append(chunk["usage"])
            whole.seeds.append(chunk["seed"])
        for choice in chunk["choices"]:
            _add(whole.choices.setdefault(choice["index"], Choice()), choice, chunk)
    return whole


def token_ids_of(events: list[Event], count: int) -> list[list[int]]:
    """Of each of `count` choices, all ids that the events hold."""
    choices = said(events).choices
    return [choices.get(index, Choice()).token_ids for index in range(count)]


def resumed(
    server: Running, body: Body, path: str, *, cursor: str, token_ids: list[list[int]] | None = None
) -> httpx.Response:
    """The answer to the same request from a client that stands at the cursor."""
    options = body["stream_options"] | ({} if token_ids is None else {"resume_token_ids": token_ids})
    return server.post(body | {"stream_options": options}, path, **{"last-event-id": cursor})


def _add(known: Choice, choice: dict[str, Any], chunk: dict[str, Any]) -> None:
    delta = choice.get("delta")
    known.text += choice["text"] if delta is None else delta.get("content") or ""
    known.reasoning += (delta or {}).get("reasoning_content") or ""
    if delta is not None and "role" in delta:
        known.openings.append(delta["role"])
    for call in (delta or {}).get("tool_calls", ()):
        if "id" in call:
            known.calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
        known.calls[call["index"]]["arguments"] += call["function"]["arguments"]
    known.token_ids += choice.get("token_ids") or []
    for key, values in (choice.get("logprobs") or {}).items():
        known.logprobs.setdefault(key, []).extend(values or [])
    if choice.get("finish_reason"):
        known.ends.append((choice["finish_reason"], choice.get("stop_reason")))
    for holder in (choice, chunk):
        if holder.get("prompt_token_ids"):
            known.prompt_token_ids.append(holder["prompt_token_ids"])
    if chunk.get("usage"):
        known.num_counted = chunk["usage"]["completion_tokens"]
