"""The cursor of a resumable stream: where it stands, short enough to be the `id:` of each of its events.

A cursor names the answer (what computed it, what was asked, the seed, its id) and, for each choice, how many
tokens the client has and what they said. It carries no words, no tokens and no rights: whoever sends it must send
the request as well, and could ask for the same answer without it. So it is not signed; the checksum finds accidents.

Invariant: `Cursor.read` gives what `write` was given, or raises InvalidRequest, whatever text it is shown.
"""

import sys
import zlib
from array import array
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta

from app.api.schemas.generation import RequestId
from app.api.schemas.limits import INT32, INT64, MAX_RESUMABLE_CHOICES
from app.core.errors import InvalidRequest

LAST_EVENT_ID = "Last-Event-ID"
MAX_CURSOR_CHARS = 4096
DIGEST_BYTES = 8
_VERSION = "1"
_CHECKSUM_BYTES = 4

Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class ChoiceCursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How far one choice is, as the client knows it."""

    position: Annotated[int, Meta(ge=0, lt=INT32)]
    """Output tokens in the events that were sent. 0: its opening was, and no token."""
    text: Digest
    """Of the reasoning and the text of these tokens, as far as it was sent."""
    token_ids: Digest
    num_cached_tokens: Annotated[int, Meta(ge=0, lt=INT32)]
    """What its usage says."""
    is_finished: bool = False
    num_reasoning_tokens: Annotated[int, Meta(ge=0, lt=INT32)] = 0
    """Of a choice that is finished: its usage says so."""


class Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """What a client must hand back, beside the request, for its stream to go on."""

    fingerprint: Digest
    prompts: Digest
    """Of the prompts' token ids."""
    parameters: Digest
    """Of all else in the request that the answer depends on, defaults resolved, without the seed."""
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)]
    """As the client gave it, or as it was drawn."""
    created: Annotated[int, Meta(ge=0, le=INT64 - 1)]
    request_id: RequestId
    """The response's id without its prefix."""
    choices: Annotated[tuple[ChoiceCursor | None, ...], Meta(min_length=1, max_length=MAX_RESUMABLE_CHOICES)]
    """None: nothing of this choice was sent."""
    is_ended: bool = False
    """The usage was sent: only [DONE] is missing."""

    def write(self) -> str:
        """As text of A-Z a-z 0-9 - _."""
        body = msgspec.msgpack.encode(self)
        return _VERSION + urlsafe_b64encode(body + _checksum(body)).rstrip(b"=").decode("ascii")

    @staticmethod
    def read(text: str) -> "Cursor":
        """Raises InvalidRequest where it is none of ours, or damaged."""
        if len(text) > MAX_CURSOR_CHARS:
            raise _invalid(f"has {len(text)} characters; a cursor has at most {MAX_CURSOR_CHARS}")
        if not text.startswith(_VERSION):
            raise _invalid("is no cursor of this version of the server: send the `id` of the stream's last event")
        padded = text[1:] + "=" * (-len(text[1:]) % 4)
        try:
            data = urlsafe_b64decode(padded.encode("ascii"))
            body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
            if checksum != _checksum(body):
                raise ValueError("checksum")
            cursor = msgspec.msgpack.decode(body, type=Cursor)
        except (ValueError, msgspec.MsgspecError):
            raise _invalid("is damaged: send the `id` of the stream's last event as it came") from None
        if cursor.write() != text:  # base64 has several spellings of one value
            raise _invalid("is damaged: send the `id` of the stream's last event as it came")
        return cursor


def digest_of(parts: Iterable[bytes]) -> bytes:
    """Of these bytes one after the other."""
    state = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.digest()


def ids_as_bytes(token_ids: Iterable[int]) -> bytes:
    """Four bytes an id, little-endian."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little")


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(f"`{LAST_EVENT_ID}` {what}.", param=LAST_EVENT_ID, code="invalid_cursor")
