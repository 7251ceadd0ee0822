"""However ids are split, the pieces joined are the library's decoding of the whole sequence."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.text import Detokenizer, Tokenizer
from app.text.vocabulary import DecoderKind
from tests.text_tokenizers import SENTENCES, byte_fallback, byte_level, default_model, metaspace, word_piece

HARD_TEXTS = (
    *SENTENCES,
    "👩‍👩‍👧‍👦👨🏿‍🚀🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "混合 mixed 文本 123 ٣ नमस्ते e\u0301 \u200b\ufeff",
    "�� real replacement characters",
    "<|end|> in <|start|> text <tool_call>",
    "   leading and trailing   ",
)
Make = Callable[[], Tokenizer]


def _joined(tokenizer: Tokenizer, ids: list[int], cuts: list[int], *, skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, skip)
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(edges)]
    return "".join(pieces) + detokenizer.finish()


def _library(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> str:
    return tokenizer.decode_by_library(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_piece, metaspace, default_model])
@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_encoded_text(make: Make, data: st.DataObject, skip: bool) -> None:
    tokenizer = make()
    text = data.draw(st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=30)))
    ids = tokenizer.encode_now(text)
    cuts = data.draw(st.lists(st.integers(0, 200), max_size=8))
    joined = _joined(tokenizer, ids, cuts, skip=skip)
    assert joined == _library(tokenizer, ids, skip=skip)
    assert joined == tokenizer.decode(ids, skip)
    assert _joined(tokenizer, ids, list(range(len(ids))), skip=skip) == joined


@pytest.mark.parametrize("make", [byte_level, word_piece, metaspace, default_model])
@settings(max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_random_ids(make: Make, data: st.DataObject, skip: bool) -> None:
    """Mostly invalid UTF-8, with special tokens between the bytes of a character."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=25))
    cuts = data.draw(st.lists(st.integers(0, 25), max_size=8))
    joined = _joined(tokenizer, ids, cuts, skip=skip)
    assert joined == _library(tokenizer, ids, skip=skip)
    assert joined == tokenizer.decode(ids, skip)


@settings(max_examples=300)
@given(st.binary(max_size=12), st.lists(st.integers(0, 12), max_size=5))
@example(b"\xe4\xbd\xf0\x9f\x98\x80\xed\xa0\x80\xc0\x80\xf5", [1, 3])
def test_any_bytes(data: bytes, cuts: list[int]) -> None:
    tokenizer = byte_level()
    ids_of_bytes = {
        tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1
    }
    ids = [ids_of_bytes[bytes([byte])] for byte in data]
    joined = _joined(tokenizer, ids, cuts, skip=True)
    assert joined == data.decode("utf-8", "replace") == _library(tokenizer, ids, skip=True)


@pytest.mark.parametrize("strip", [True, False])
@settings(max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_byte_fallback_runs(strip: bool, data: st.DataObject, skip: bool) -> None:
    """Runs of byte tokens that are valid, or begin invalid: there the library's all-or-nothing is ours."""
    tokenizer = byte_fallback(strip)
    assert tokenizer.vocabulary.kind is DecoderKind.BYTE_FALLBACK
    piece = st.integers(3 + 256, tokenizer.vocab_size - 1).map(lambda i: [i])
    valid_run = st.text(max_size=3).map(lambda text: [3 + byte for byte in text.encode()])
    invalid_run = st.sampled_from([b"\x80", b"\xe4\xbd", b"\xf0\x9f", b"\xff\xfe", b"\xed\xa0\x80"])
    parts = data.draw(
        st.lists(
            st.tuples(piece, st.one_of(valid_run, invalid_run.map(lambda run: [3 + byte for byte in run]))), max_size=8
        )
    )
    ids = [token_id for text_part, run in parts for token_id in (*run, *text_part)]
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=8))
    assert _joined(tokenizer, ids, cuts, skip=skip) == _library(tokenizer, ids, skip=skip)


@settings(max_examples=150)
@given(st.lists(st.integers(0, 280), max_size=25), st.lists(st.integers(0, 25), max_size=8), st.booleans())
def test_byte_fallback_random_ids_split_or_whole(ids: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = byte_fallback()
    assert _joined(tokenizer, ids, cuts, skip=skip) == tokenizer.decode(ids, skip)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 310), max_size=40))
def test_at_most_three_bytes_wait(ids: list[int]) -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push([token_id]) for token_id in ids)
    rest = tokenizer.decode(ids)[len(text) :]
    assert rest in ("", "\ufffd")
