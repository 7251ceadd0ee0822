"""app.text.detokenizer: what a stream shows at which token."""

from tokenizers import decoders

from app.text import Detokenizer, Tokenizer
from tests.text_tokenizers import byte_fallback, byte_level, listed, metaspace, word_piece


def _pieces(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.finish()]


def test_a_character_comes_with_its_last_byte() -> None:
    ids = byte_level().encode_now("a鿿b")
    assert _pieces(byte_level(), ids) == ["a", "", "", "鿿", "b", ""]


def test_invalid_bytes_are_replaced_at_once_and_never_stall() -> None:
    tokenizer = byte_level()
    lead, middle = tokenizer.encode_now("鿿")[:2]
    a = tokenizer.encode_now("a")[0]
    assert _pieces(tokenizer, [lead, a, middle, middle, a]) == ["", "\ufffda", "\ufffd", "\ufffd", "a", ""]
    assert _pieces(tokenizer, [lead, middle]) == ["", "", "\ufffd"]


def test_a_special_token_is_hidden_unless_asked_for() -> None:
    assert _pieces(byte_level(), [0, 1]) == ["", "", ""]
    assert _pieces(byte_level(), [0, 1], skip_special_tokens=False) == ["<|start|>", "<|end|>", ""]
    assert _pieces(word_piece(), [2, 1, 3]) == ["hello", "", " world", ""]
    assert _pieces(word_piece(), [2, 1, 3], skip_special_tokens=False) == ["hello", " [SEP]", " world", ""]


def test_an_id_without_a_token_is_nothing() -> None:
    for tokenizer in (byte_level(), byte_fallback(), word_piece()):
        assert _pieces(tokenizer, [tokenizer.vocab_size, 2**31]) == ["", "", ""]


def test_byte_fallback_replaces_only_the_invalid_bytes() -> None:
    ids = [3 + byte for byte in (0xE4, 0xBD, 0xA0, 0xE4, 0xBD, 0x41, 0xF0)]
    assert _pieces(byte_fallback(), ids) == ["", "", "你", "", "", "\ufffd\ufffdA", "", "\ufffd"]


def test_only_the_first_token_of_a_text_loses_its_space() -> None:
    for tokenizer, word in ((byte_fallback(), "w"), (metaspace(), "hello")):
        ids = tokenizer.encode_now(f"{word} {word}")
        assert _pieces(tokenizer, ids[-1:] * 2) == [word, f" {word}", ""]
        going_on = Detokenizer(tokenizer, after=ids)
        assert going_on.push(ids[-1:]) + going_on.finish() == f" {word}"
    only_special = Detokenizer(byte_fallback(), after=[1])
    assert only_special.push(byte_fallback().encode_now("w")) == "w"


def test_a_window_holds_an_unfinished_character_back_but_not_for_ever() -> None:
    tokenizer = word_piece()
    assert _pieces(tokenizer, tokenizer.encode_now("hello tokenizers, 你好")) == [
        "hello", " token", "ize", "r", "s", ",", " 你", " 好", "",
    ]  # fmt: skip


def test_a_window_waits_for_a_character_and_gives_up_on_garbage() -> None:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("_", 1, 0)]
    tokenizer = listed(decoders.Sequence(steps))
    b = 1
    ids = [2 + byte for byte in "你".encode()]
    assert _pieces(tokenizer, [b, *ids, b]) == ["b", "", "", "你", "b", ""]
    assert _pieces(tokenizer, [2 + 0xFF] * 4) == ["", "", "", "\ufffd" * 4, ""]
    assert "\ufffd" in _pieces(tokenizer, [b, ids[0]])[-1]


def test_without_a_decoder_tokens_are_joined_by_spaces() -> None:
    assert _pieces(listed(None), [1, 1]) == ["b", " b", ""]
