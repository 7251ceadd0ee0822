"""Token ids of converted tokenizers against llama.cpp's, made by tests/data/make_tokenizer_reference.py."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from app.core.errors import ConfigurationError
from app.store.gguf_file import GgufFile
from app.store.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files
from tests.gguf_maker import sentencepiece_fields, tokenizer_fields
from tests.store_models import default_model_folder

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "tokenizer_reference_ids.json").read_text())
TINY: dict[str, list[str]] = json.loads((DATA / "tokenizer_tiny.json").read_text())
VOCAB_SIZE = len(TINY["tokens"])


def convert(pre_name: str, /, **changes: object) -> Tokenizer:
    """The tokenizer of the tiny vocabulary with some metadata changed."""
    return Tokenizer.from_str(tokenizer_files(metadata(pre_name, **changes), vocab_size=VOCAB_SIZE)["tokenizer.json"])


def metadata(pre_name: str, /, **changes: object) -> GgufFile:
    """Metadata alone: the tokenizer needs no tensors. A change to None takes the key away."""
    fields = tokenizer_fields(TINY, pre=pre_name)
    fields.update({f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    kept = {key: value for key, value in fields.items() if value is not None}
    return GgufFile(Path("tiny.gguf"), kept, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_ids_of_each_known_cut_equal_llama_cpp(pre: str) -> None:
    tokenizer = convert(pre)
    for text, expected in zip(REFERENCE["texts"], REFERENCE["tiny"][pre], strict=True):
        assert tokenizer.encode(text).ids == expected, text


def test_the_cuts_are_told_apart_by_the_reference() -> None:
    """Else the test above would pass with any of them."""
    smollm, gpt2, llama3, qwen2 = (REFERENCE["tiny"][pre] for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2"))
    assert smollm != gpt2
    assert gpt2 != qwen2
    assert [ids[1:] for ids in llama3] != qwen2


def test_ids_of_the_default_model_equal_llama_cpp() -> None:
    tokenizer = Tokenizer.from_file(str(default_model_folder().path / "tokenizer.json"))
    for text, expected in zip(REFERENCE["texts"], REFERENCE["default_model"], strict=True):
        assert tokenizer.encode(text).ids == expected, text


def test_ids_of_sentencepiece_equal_llama_cpp() -> None:
    tokenizer = sentencepiece()
    for text, expected in zip(REFERENCE["texts"], REFERENCE["sentencepiece"], strict=True):
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == text
    assert any(2 < token_id < 259 for ids in REFERENCE["sentencepiece"] for token_id in ids)


def sentencepiece(**changes: object) -> Tokenizer:
    """The SentencePiece vocabulary with some metadata changed."""
    fields = sentencepiece_fields(TINY["sentencepiece"])
    fields.update({f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    file = GgufFile(Path("tiny.gguf"), {key: value for key, value in fields.items() if value is not None}, {})  # type: ignore[misc]
    return Tokenizer.from_str(tokenizer_files(file, vocab_size=VOCAB_SIZE)["tokenizer.json"])


def test_the_space_before_the_text_can_be_off() -> None:
    tokenizer = sentencepiece(add_space_prefix=False, add_bos_token=False)
    assert tokenizer.decode(tokenizer.encode(" a").ids) == " a"
    assert tokenizer.encode("a").ids != sentencepiece(add_bos_token=False).encode("a").ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "lacks a score"),
        ({"scores": [0.0]}, "lacks a score"),
        ({"tokens": [*TINY["sentencepiece"][:3], "[gone]", *TINY["sentencepiece"][4:]]}, "byte token <0x00>"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"precompiled_charsmap": [1]}, "character map"),
        ({"unknown_token_id": -1}, "unknown_token_id is -1"),
    ],
)
def test_a_broken_sentencepiece_vocabulary_is_one_clear_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        sentencepiece(**changes)


def test_text_survives_encoding_and_decoding() -> None:
    tokenizer = convert("smollm")
    for text in REFERENCE["texts"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_bos_and_eos_are_added_where_the_file_says_so() -> None:
    bos, eos = 1, 2
    plain = convert("smollm").encode("a").ids
    assert convert("smollm", add_bos_token=True).encode("a").ids == [bos, *plain]
    assert convert("smollm", add_bos_token=True, add_eos_token=True).encode("a").ids == [bos, *plain, eos]
    assert convert("smollm", add_bos_token=True).encode("a", add_special_tokens=False).ids == plain
    assert convert("llama-bpe").encode("a").ids == [bos, *plain]
    assert convert("llama-bpe", add_bos_token=False).encode("a").ids == plain


def test_qwen2_composes_characters_first() -> None:
    """As the model's own tokenizer does; llama.cpp leaves this to its caller."""
    assert convert("qwen2").encode("e\u0301").ids == convert("qwen2").encode("\u00e9").ids
    assert convert("smollm").encode("e\u0301").ids != convert("smollm").encode("\u00e9").ids


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    types = [3, 3, 4] + [1] * (VOCAB_SIZE - 3)
    tokenizer = convert("smollm", token_type=types)
    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids[::2] == [1, 2]
    assert tokenizer.decode([1, 2]) == "<|im_end|>"


def test_an_unknown_cut_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"named 'tekken'.*smollm"):
        convert("tekken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": None}, "named None"),
        ({"model": "t5"}, "of the kind 't5'"),
        ({"add_space_prefix": True}, "adds a space"),
        ({"tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"tokens": [*TINY["tokens"], "surplus"]}, "tokens for .* rows"),
        ({"tokens": [*TINY["tokens"][:-1], TINY["tokens"][5]]}, "twice"),
        ({"token_type": [1, 2, 3]}, "lacks a type"),
        ({"merges": ["nothing"]}, "joins nothing"),
        ({"merges": ["zz zzz"]}, "does not hold together"),
        ({"add_bos_token": True, "bos_token_id": 1 << 20}, "asks for a BOS token"),
    ],
)
def test_a_broken_vocabulary_is_one_clear_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        convert("smollm", **changes)


def test_the_chat_template_and_special_tokens_are_kept() -> None:
    file = metadata("smollm")
    file.metadata["tokenizer.chat_template"] = "{{ messages }}\n"
    files = tokenizer_files(file, vocab_size=VOCAB_SIZE)
    assert files["chat_template.jinja"] == "{{ messages }}\n"
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
