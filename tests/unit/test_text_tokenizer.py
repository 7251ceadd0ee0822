"""app.text.tokenizer and vocabulary: encoding, byte tables, special tokens, facts for admission."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from app.core.errors import ConfigurationError, InvalidRequest
from app.text import Tokenizer
from app.text.vocabulary import DecoderKind, byte_alphabet
from tests.text_tokenizers import (
    SENTENCES,
    byte_fallback,
    byte_level,
    default_model,
    id_of,
    listed,
    metaspace,
    word_piece,
)


def test_importing_text_loads_no_torch_and_no_transformers() -> None:
    code = "import sys, app.text; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_kind_of_decoder_is_recognised() -> None:
    kinds = [t.vocabulary.kind for t in (byte_level(), byte_fallback(), word_piece(), metaspace())]
    assert kinds == [DecoderKind.BYTE_LEVEL, DecoderKind.BYTE_FALLBACK, DecoderKind.OTHER, DecoderKind.OTHER]


def test_an_unknown_chain_of_decoders_is_left_to_the_library() -> None:
    replace, fallback, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    known = decoders.Sequence([replace, fallback, fuse, decoders.Strip(" ", 1, 0)])
    odd = decoders.Sequence([replace, fallback, fuse, decoders.Strip("_", 1, 0)])
    kinds = [listed(decoder).vocabulary.kind for decoder in (known, odd, None)]
    assert kinds == [DecoderKind.BYTE_FALLBACK, DecoderKind.OTHER, DecoderKind.OTHER]


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize("text", SENTENCES)
async def test_tokens_bytes_joined_are_the_text(text: str) -> None:
    tokenizer = byte_level()
    ids = (await tokenizer.encode([text]))[0]
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_now(text) == ids


async def test_a_file_is_loaded_without_its_truncation_and_padding(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_str(byte_level()._library.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=3)
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<|start|>", "__type": "AddedToken"}, "eos_token": "<|end|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    short, long = await tokenizer.encode(["a", "The quick brown fox"])
    assert (len(short), tokenizer.decode(long)) == (1, "The quick brown fox")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_broken_file_is_the_operators_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot load the tokenizer"):
        Tokenizer.load(tmp_path)


def test_special_tokens_come_from_the_older_file_too(tmp_path: Path) -> None:
    byte_level()._library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 1)
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"special_tokens_map\.json holds a list"):
        Tokenizer.load(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot read"):
        Tokenizer.load(tmp_path)


async def test_a_lone_surrogate_is_refused_by_place() -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D800 at character 2"):
        await byte_level().encode(["fine", "ab\ud800"])
    with pytest.raises(InvalidRequest):
        byte_level().encode_now("\udfff")


def test_a_token_is_shown_as_text_or_as_bytes() -> None:
    tokenizer = byte_level()
    whole, *part = tokenizer.encode_now("a鿿")
    assert tokenizer.token_text(whole) == "a"
    assert [tokenizer.token_text(i) for i in part] == [r"bytes:\xe9", r"bytes:\xbf", r"bytes:\xbf"]
    assert tokenizer.token_text(id_of(tokenizer, "两字 plain")) == "两字 plain"
    assert tokenizer.token_text(1) == "<|end|>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    assert byte_fallback().token_text(3 + 0xE4) == r"bytes:\xe4"
    assert id_of(byte_fallback(), " 你") == byte_fallback().encode_now("你")[0]
    assert word_piece().token_text(5) == "##ize"


def test_special_tokens_are_known() -> None:
    tokenizer = byte_level()
    tool = id_of(tokenizer, "<tool_call>")
    assert [tokenizer.is_special(i) for i in (0, 1, tool, 2)] == [True, True, False, False]
    assert tokenizer.decode([1, tool]) == "<tool_call>"
    assert tokenizer.decode([1, tool], skip_special_tokens=False) == "<|end|><tool_call>"


def _with(**parts: object) -> Tokenizer:
    library = tokenizers.Tokenizer.from_str(byte_level()._library.to_str())
    for name, part in parts.items():
        setattr(library, name, part)
    return Tokenizer(library, special_tokens={})


def test_admission_knows_what_may_shrink_text() -> None:
    assert not byte_level().may_shrink_text
    assert not byte_fallback().may_shrink_text
    assert word_piece().may_shrink_text
    assert metaspace().may_shrink_text
    for normaliser in (
        normalizers.NFC(),
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.Replace("  ", " "),
        normalizers.Sequence([normalizers.Prepend("_"), normalizers.NFC()]),
    ):
        assert _with(normalizer=normaliser).may_shrink_text, normaliser
    assert not _with(normalizer=normalizers.Replace(" ", "▁")).may_shrink_text
    byte_pairs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for behavior, shrinks in (("removed", True), ("isolated", False)):
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", behavior), byte_pairs])
        assert _with(pre_tokenizer=split).may_shrink_text is shrinks
    assert _with(pre_tokenizer=pre_tokenizers.Whitespace()).may_shrink_text


def test_a_token_that_swallows_spaces_shrinks_text() -> None:
    library = tokenizers.Tokenizer.from_str(byte_level()._library.to_str())
    library.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    assert Tokenizer(library, special_tokens={}).may_shrink_text


@pytest.mark.parametrize("text", ["", "a" * 5000, " " * 5000, "你好" * 1000, "\n" * 999, SENTENCES[2] * 30])
@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_piece, default_model])
def test_no_text_has_fewer_tokens_than_the_bound(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    num_tokens = len(tokenizer.encode_now(text, add_special_tokens=False))
    assert tokenizer.least_num_tokens(text) <= num_tokens
    if not tokenizer.may_shrink_text:
        assert tokenizer.least_num_tokens(text) * tokenizer.max_token_bytes >= len(text.encode())


def _with_few_bytes(*, unk_token: str | None, fuse_unk: bool) -> Tokenizer:
    vocab = {"a": 0, "b": 1, "ab": 2, "<unk>": 3}
    model = models.BPE(vocab=vocab, merges=[("a", "b")], unk_token=unk_token, fuse_unk=fuse_unk)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library, special_tokens={})


@pytest.mark.parametrize(("unk_token", "fuse_unk"), [(None, False), ("<unk>", True), ("<unk>", False)])
def test_bytes_without_a_token_do_not_count_in_the_bound(unk_token: str | None, fuse_unk: bool) -> None:
    """A real vocabulary may lack rare bytes: a text of them alone can have no tokens at all."""
    tokenizer = _with_few_bytes(unk_token=unk_token, fuse_unk=fuse_unk)
    assert not tokenizer.may_shrink_text
    for text in ("\x04" * 500, "ab" * 500 + "你" * 500, "b\x04" * 500):
        assert tokenizer.least_num_tokens(text) <= len(tokenizer.encode_now(text))
    assert tokenizer.least_num_tokens("ab" * 500) == 1000 // tokenizer.max_token_bytes
