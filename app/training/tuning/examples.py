"""Reads examples: what the model is given, and what it should answer.

A line of a .jsonl file has `messages` (roles and contents), or `prompt` and `completion`, or `text`; any other text
file is one example of plain text. Equal examples are kept once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.core.errors import ConfigurationError
from app.training.corpus import LINES_SUFFIX, read_text, suffix_of, text_files

_ROLES = frozenset(["system", "developer", "user", "assistant", "tool"])


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """Every message of the assistant is an answer."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Pair:
    """The completion is the answer. No template is put around the two: they are what `/v1/completions` sees."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Plain:
    """Text without a question: all of it is learnt."""

    text: str


Example = Chat | Pair | Plain


def read_examples(places: Sequence[Path]) -> tuple[Example, ...]:
    """Every example below the given files and folders, in the order of their names.

    Raises:
        ConfigurationError: nothing to read, a file that is no UTF-8 or vanished, or a line that is no example.
    """
    found = (example for place in places for file in text_files(place) for example in _examples(file))
    examples = tuple(dict.fromkeys(found))
    if not examples:
        raise ConfigurationError(f"no examples in {', '.join(map(str, places))}; give .jsonl or text files")
    return examples


def _examples(file: Path) -> Iterator[Example]:
    text = read_text(file)
    if suffix_of(file) != LINES_SUFFIX:
        yield from (Plain(one) for one in [text] if one.strip())
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _example(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{file}, line {number} is no example: {error}; a line has `messages`, or `prompt` and `completion`, "
                "or `text`"
            ) from error


def _example(fields: object) -> Example:
    if not isinstance(fields, Mapping):
        raise TypeError("it is no JSON object")
    if "messages" in fields:
        return _chat(fields["messages"])
    if "prompt" in fields or "completion" in fields:
        pair = Pair(_string(fields, "prompt"), _string(fields, "completion"))
        if not pair.completion:
            raise ValueError("`completion` is empty")
        return pair
    return Plain(_string(fields, "text", may_be_blank=False))


def _chat(messages: object) -> Chat:
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
        raise TypeError("`messages` is no list of objects")
    chat = Chat(tuple(Message(_string(one, "role"), _string(one, "content")) for one in messages))
    unknown = {message.role for message in chat.messages} - _ROLES
    if unknown:
        raise ValueError(f"role {min(unknown)!r} is none of {', '.join(sorted(_ROLES))}")
    if not any(message.role == "assistant" and message.content for message in chat.messages):
        raise ValueError("`messages` has no answer of the assistant")
    return chat


def _string(fields: Mapping[str, object], name: str, *, may_be_blank: bool = True) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise TypeError(f"`{name}` is {'missing' if value is None else 'no string'}")
    if not may_be_blank and not value.strip():
        raise ValueError(f"`{name}` is empty")
    value.encode()  # half a surrogate pair is no text
    return value
