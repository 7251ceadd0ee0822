"""Owns the loaded tokenizer.json: text → ids in a thread, ids → text, facts for admission.

Invariants: truncation and padding written in the file never apply; encoding many or long texts never
holds the GIL, and of many large ones one is encoded at a time; a text that is not valid Unicode never
reaches the library.
"""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from app.core.errors import ConfigurationError, InvalidRequest
from app.text.detokenizer import Detokenizer
from app.text.heap import trim
from app.text.model_files import read_special_tokens
from app.text.shrink import may_shrink
from app.text.vocabulary import DecoderKind, Vocabulary

LARGE_CHARS = 256 * 1024


class Tokenizer:
    """A model's tokenizer. Safe to share between coroutines and threads: nothing in it changes."""

    def __init__(self, library: tokenizers.Tokenizer, *, special_tokens: dict[str, str]) -> None:
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._large = asyncio.Lock()
        self.special_tokens = special_tokens
        """Role → content, as in {"eos_token": "</s>"}."""
        self.vocabulary = Vocabulary.of(library)
        self.vocab_size = len(self.vocabulary.token_bytes)
        """Every id of this tokenizer is below it; the model's own vocabulary may be padded beyond."""
        self.max_token_bytes = max(map(len, self.vocabulary.token_bytes), default=0)
        """Most bytes of text that one token stands for."""
        self.may_shrink_text = self.vocabulary.dropped_bytes is None or may_shrink(library)
        """Whether a text can have fewer tokens than its bytes ask for, so that only tokenizing tells."""
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Read tokenizer.json of a canonical model folder; raises `ConfigurationError`."""
        path = model_dir / "tokenizer.json"
        try:
            library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for a bad file
            raise ConfigurationError(f"cannot load the tokenizer {path}: {error}; fetch the model again") from error
        return cls(library, special_tokens=read_special_tokens(model_dir))

    async def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text; raises `InvalidRequest` for a text with a lone surrogate."""
        if sum(map(len, texts)) < LARGE_CHARS:
            return await asyncio.to_thread(self._encode_batch, texts, add_special_tokens)
        # Whoever waits for it may leave, but the next one does not begin before its thread is done.
        return await asyncio.shield(asyncio.create_task(self._encode_large(texts, add_special_tokens)))

    def encode_now(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` for short texts outside the event loop; raises the same."""
        return self._encode_batch((text,), add_special_tokens)[0]

    def least_num_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, known without tokenizing it; 0 if `may_shrink_text`."""
        dropped = self.vocabulary.dropped_bytes
        if self.may_shrink_text or dropped is None:
            return 0
        num_bytes = len(text.encode("utf-8", "surrogatepass").translate(None, dropped))
        return -(-num_bytes // max(self.max_token_bytes, 1))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; the same as a `Detokenizer` gives in pieces. Unknown ids are nothing."""
        if self.vocabulary.kind is DecoderKind.OTHER:
            return self.decode_by_library(token_ids, skip_special_tokens=skip_special_tokens)
        detokenizer = Detokenizer(self, skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.finish()

    def decode_by_library(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The library's own decoding, whatever the kind of decoder; ids as unsigned 32 bit."""
        if not token_ids:
            return ""  # some of the library's decoders panic on nothing
        return self._library.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token, a special one's content included; empty for an id without a token."""
        table = self.vocabulary.token_bytes
        return table[token_id] if 0 <= token_id < len(table) else b""

    def token_text(self, token_id: int) -> str:
        r"""How logprobs show a token: its text, or `bytes:\xe4\xbd` where it is part of a character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in data)

    def token_id(self, text: str) -> int | None:
        """The token whose content this is, as it stands in the vocabulary; None where there is none."""
        return self._library.token_to_id(text)

    def is_special(self, token_id: int) -> bool:
        """Whether this id is a control token, shown only on request."""
        return token_id in self.vocabulary.special_ids

    async def _encode_large(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """One at a time: the library takes some 200 times a text's size, and its threads keep what they had."""
        async with self._large:
            try:
                return await asyncio.to_thread(self._encode_batch, texts, add_special_tokens)
            finally:
                await asyncio.to_thread(trim)

    def _encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        _refuse_surrogates(texts)
        # Unlike `encode`, the batch call releases the GIL; "fast" skips the offsets, which nobody reads.
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _special_id(self, role: str) -> int | None:
        content = self.special_tokens.get(role)
        return None if content is None else self._library.token_to_id(content)


def _refuse_surrogates(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), "
                "which is not valid Unicode; send it whole or leave it out"
            ) from error
