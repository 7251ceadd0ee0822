"""Owns the text state of one token stream: ids in, text out, in pieces that never split a character.

Invariants: the pieces and `finish` joined equal `Tokenizer.decode` of all ids, however the ids were
split. Bytes that are not UTF-8 become U+FFFD as soon as it is certain that they are not, so at most
three bytes are ever held back and garbage cannot stall a stream.

With a byte-level vocabulary this is what the library gives for the whole sequence (one U+FFFD for each
maximal invalid part). With byte fallback the library turns a run of byte tokens into U+FFFD as a whole
if any of it is invalid, which no stream can know beforehand: here only the invalid bytes do, one
U+FFFD each; valid runs and wholly invalid ones come out the same.
"""

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from app.text.vocabulary import DecoderKind

if TYPE_CHECKING:
    from app.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 4
"""A character has at most four bytes, so four tokens that end in no character hold an invalid one."""
_CONTEXT_TOKENS = 6


class TextDecoder(Protocol):
    """Turns ids into text; one object a stream."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class Detokenizer:
    """Text of one stream. `after` are the ids that the stream goes on from.

    Only a text's very first token loses the space that sentencepiece puts before it: with `after`
    (the prompt) the stream's first token keeps it.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool = True, *, after: Sequence[int] = ()) -> None:
        self._decoder = _choose(tokenizer, skip_special_tokens=skip_special_tokens, after=after)
        self.push = self._decoder.push
        """Takes the next ids, gives the text that became certain; may be empty."""

    def finish(self) -> str:
        """What was held back, at the end of the stream: an incomplete character becomes U+FFFD."""
        return self._decoder.finish()


def _choose(tokenizer: "Tokenizer", *, skip_special_tokens: bool, after: Sequence[int]) -> TextDecoder:
    vocabulary = tokenizer.vocabulary
    if vocabulary.kind is DecoderKind.OTHER:
        return _WindowDecoder(tokenizer, skip_special_tokens=skip_special_tokens, after=after)
    table = vocabulary.visible_bytes if skip_special_tokens else vocabulary.token_bytes
    if vocabulary.kind is DecoderKind.BYTE_LEVEL:
        return _ByteDecoder(table)
    starts = not any(table[token_id] for token_id in after if token_id < len(table))
    return _FallbackDecoder(table, strip=vocabulary.strips_leading_space and starts)


class _ByteDecoder:
    """Byte-level BPE: the text is the UTF-8 decoding of the bytes, one after the other."""

    __slots__ = ("_held", "_size", "_table")

    def __init__(self, table: tuple[bytes, ...]) -> None:
        self._table = table
        self._size = len(table)
        self._held = b""

    def push(self, token_ids: Sequence[int]) -> str:
        table, size = self._table, self._size
        # A model may draw ids from the padding of its vocabulary: no token, no text.
        data = b"".join([table[token_id] for token_id in token_ids if token_id < size])
        return self._decode(self._held + data)

    def finish(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")

    def _decode(self, data: bytes) -> str:
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text


class _FallbackDecoder(_ByteDecoder):
    """Byte fallback: the same with one U+FFFD for each invalid byte, and perhaps the first space dropped."""

    __slots__ = ("_strip",)

    def __init__(self, table: tuple[bytes, ...], *, strip: bool) -> None:
        super().__init__(table)
        self._strip = strip

    def finish(self) -> str:
        held, self._held = self._held, b""
        return _REPLACEMENT * len(held)

    def _decode(self, data: bytes) -> str:
        text, self._held = _decode_replacing_each_byte(data)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _decode_replacing_each_byte(data: bytes) -> tuple[str, bytes]:
    """The text of `data` and the bytes at its end that may begin a character."""
    parts: list[str] = []
    rest = memoryview(data)
    while True:
        try:
            text, used = utf_8_decode(rest, "strict", False)
        except UnicodeDecodeError as error:
            parts += (str(rest[: error.start], "utf-8"), _REPLACEMENT * (error.end - error.start))
            rest = rest[error.end :]
        else:
            return "".join((*parts, text)), bytes(rest[used:])


class _WindowDecoder:
    """Any other decoder: the library decodes a window of ids, and what the window's start gave is cut off."""

    def __init__(self, tokenizer: "Tokenizer", *, skip_special_tokens: bool, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._context = self._visible(after)[-_CONTEXT_TOKENS:]
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in self._visible(token_ids)])

    def finish(self) -> str:
        return self._release(self._new_text())

    def _push_one(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        if self._held:
            self._context = (self._context + self._held)[-_CONTEXT_TOKENS:]
            self._held = []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode_by_library(token_ids, skip_special_tokens=False)

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        size = self._tokenizer.vocab_size
        return [token_id for token_id in token_ids if token_id < size and token_id not in self._hidden]
