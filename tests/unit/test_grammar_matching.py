"""The state of one sequence in its grammar: masks, ends, tokens handed over, tokenizers of each kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.types import EngineRequest, Grammar
from app.grammar import source
from app.grammar.errors import GrammarError
from app.grammar.matching import MaskMaker, Matchers, MatchState, has_bit
from app.text import Tokenizer
from tests.fakes import make_request
from tests.text_tokenizers import byte_fallback, byte_level

EOS = 1
MASKS = MaskMaker()
WORDS = source.choice(["Hello 你好", "Hello 🌍", "no"])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="module")
def matchers(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Matchers:
    return matchers_of(tokenizer, tmp_path_factory.mktemp("model"))


def matchers_of(tokenizer: Tokenizer, folder: Path, *, vocab_size: int | None = None) -> Matchers:
    tokenizer._library.save(str(folder / "tokenizer.json"))
    size = tokenizer.vocab_size + 7 if vocab_size is None else vocab_size
    return Matchers(folder, vocab_size=size, eos_token_ids=(EOS, 10**6))


def asked(grammar: Grammar, output: Sequence[int] = (), **params: Any) -> EngineRequest:
    request = make_request("r", [5], output_token_ids=output)
    changed = msgspec.structs.replace(request.params, grammar=grammar, **params)
    return msgspec.structs.replace(request, params=changed)


def allowed(state: MatchState) -> set[int]:
    """Ids of the mask."""
    mask = state.mask
    assert mask is not None
    return {index for index in range(32 * len(mask)) if int(mask[index // 32]) >> (index % 32) & 1}


def follow(state: MatchState, token_ids: Sequence[int]) -> None:
    """Take tokens one by one, each allowed by its mask."""
    for token_id in token_ids:
        assert state.goes_on and token_id in allowed(state)
        state.accept([token_id])
        if state.goes_on:
            MASKS.compute([state])


@pytest.mark.parametrize("text", ["Hello 你好", "Hello 🌍", "no"])
def test_each_choice_can_be_written_to_its_end(matchers: Matchers, tokenizer: Tokenizer, text: str) -> None:
    state = matchers.prepare(asked(WORDS))
    follow(state, tokenizer.encode_now(text, False))
    assert state.is_end and state.error is None


RECORD = source.json_schema({"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}})


@pytest.mark.parametrize(
    "grammar", [WORDS, RECORD, source.regex("(ab|a.c){2}[0-9]*")], ids=["words", "record", "regex"]
)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_token_is_allowed_without_a_mask_as_with_it(matchers: Matchers, grammar: Grammar, ignore_eos: bool) -> None:
    """Along a walk, for every token of the vocabulary; asking changes nothing."""
    state = matchers.prepare(asked(grammar, ignore_eos=ignore_eos))
    asked_of = matchers.prepare(asked(grammar, ignore_eos=ignore_eos))
    for step in range(40):
        known = allowed(state)
        assert {token_id for token_id in range(32 * len(state.ends)) if asked_of.allows(token_id)} == known - {EOS}
        assert asked_of.error is None
        token_id = sorted(known - {EOS})[step * 7 % len(known - {EOS})]
        assert has_bit(state.only(token_id), token_id) and state.only(token_id).view(np.uint32).sum().bit_count() == 1
        for one in (state, asked_of):
            one.accept([token_id])
        if state.goes_on:
            MASKS.compute([state])
        if not state.goes_on:
            break


def test_only_what_leads_on_is_allowed(matchers: Matchers, tokenizer: Tokenizer) -> None:
    state = matchers.prepare(asked(WORDS))
    texts = {tokenizer.token_bytes(token_id) for token_id in allowed(state)}
    assert texts and all(any(word.encode().startswith(text) for word in ("Hello 你好", "no")) for text in texts)
    state.accept([tokenizer.encode_now("x", False)[0]])
    assert state.error is not None and not state.goes_on


def test_an_end_of_text_is_allowed_where_the_grammar_may_end(matchers: Matchers, tokenizer: Tokenizer) -> None:
    digits = tokenizer.encode_now("12", False)
    for ignore_eos in (False, True):
        state = matchers.prepare(asked(source.regex("[0-9]{2,4}"), ignore_eos=ignore_eos))
        assert EOS not in allowed(state)
        follow(state, digits)
        assert state.goes_on and (EOS in allowed(state)) is not ignore_eos
    state = matchers.prepare(asked(source.regex("[0-9]{2,4}"), digits))
    follow(state, [EOS])
    assert state.is_end and state.error is None


def test_tokens_handed_over_lead_to_the_same_state(matchers: Matchers, tokenizer: Tokenizer) -> None:
    grammar = source.json_schema({"type": "object", "properties": {"名": {"type": "string"}}, "required": ["名"]})
    token_ids = tokenizer.encode_now('{"名": "你🌍", "x": [1, {"y": null}]}', False)
    whole = matchers.prepare(asked(grammar))
    for count, token_id in enumerate(token_ids):
        assert allowed(matchers.prepare(asked(grammar, token_ids[:count]))) == allowed(whole)
        follow(whole, [token_id])
    assert whole.is_end
    assert matchers.prepare(asked(grammar, token_ids)).is_end
    with pytest.raises(GrammarError, match="handed over"):
        matchers.prepare(asked(grammar, [*token_ids, token_ids[0]]))


def test_states_of_one_grammar_do_not_touch_each_other(matchers: Matchers, tokenizer: Tokenizer) -> None:
    one, other = matchers.prepare(asked(WORDS)), matchers.prepare(asked(WORDS))
    before = allowed(other)
    follow(one, tokenizer.encode_now("Hello", False))
    MASKS.compute([other])
    assert allowed(other) == before != allowed(one)


def test_an_empty_language_is_refused_and_an_empty_text_is_an_end(matchers: Matchers) -> None:
    with pytest.raises(GrammarError):
        matchers.prepare(asked(source.lark("start: start")))
    assert matchers.prepare(asked(source.regex(""))).is_end


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=30))
def test_every_text_can_be_a_json_string(matchers: Matchers, tokenizer: Tokenizer, text: str) -> None:
    state = matchers.prepare(asked(source.json_schema({"type": "string"})))
    follow(state, tokenizer.encode_now(msgspec.json.encode(text).decode(), False))
    assert state.is_end


def test_sentencepiece_vocabularies_work(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    state = matchers_of(tokenizer, tmp_path).prepare(asked(source.choice(["hello world", "你🌍"])))
    first = {tokenizer.token_bytes(token_id) for token_id in allowed(state)}
    assert {b"h", b"hell", "你".encode(), "你".encode()[:1]} <= first
    assert not any(tokenizer.is_special(token_id) for token_id in allowed(state))


def test_a_model_with_a_smaller_vocabulary_than_its_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    matchers = matchers_of(tokenizer, tmp_path, vocab_size=tokenizer.vocab_size - 3)
    mask = matchers.prepare(asked(WORDS)).mask
    assert mask is not None and len(mask) * 32 >= tokenizer.vocab_size


@pytest.mark.parametrize("content", [None, b"{}", b"no json", b"\xff"])
def test_a_tokenizer_that_cannot_be_read_is_an_error_of_the_sequence(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(GrammarError, match="tokenizer"):
        Matchers(tmp_path, vocab_size=10, eos_token_ids=()).prepare(asked(WORDS))


class TestBehindReasoning:
    """A grammar that begins behind a model's reasoning: here `ñandú` begins that, and `<tool_call>` ends it."""

    @pytest.fixture
    def ids(self, tokenizer: Tokenizer) -> tuple[int, int]:
        opening, closing = tokenizer.token_id("ñandú"), tokenizer.token_id("<tool_call>")
        assert opening is not None and closing is not None
        return opening, closing

    def test_anything_goes_before_it_but_an_end(
        self, matchers: Matchers, tokenizer: Tokenizer, ids: tuple[int, int]
    ) -> None:
        _, closing = ids
        state = matchers.prepare(asked(msgspec.structs.replace(WORDS, after=closing)))
        assert len(allowed(state)) == tokenizer.vocab_size + 7 - 1 and EOS not in allowed(state)
        follow(state, tokenizer.encode_now("x Hello no x", False))
        assert EOS not in allowed(state)
        follow(state, [closing])
        assert allowed(state) == allowed(matchers.prepare(asked(WORDS)))
        follow(state, tokenizer.encode_now("no", False))
        assert state.is_end and state.error is None

    def test_where_the_model_decides_its_first_token_does(
        self, matchers: Matchers, tokenizer: Tokenizer, ids: tuple[int, int]
    ) -> None:
        opening, closing = ids
        grammar = msgspec.structs.replace(WORDS, after=closing, opened_by=opening)
        plain = allowed(matchers.prepare(asked(WORDS)))
        state = matchers.prepare(asked(grammar))
        assert allowed(state) == plain | {opening}
        follow(state, tokenizer.encode_now("no", False))
        assert state.is_end
        state = matchers.prepare(asked(grammar))
        follow(state, [opening, *tokenizer.encode_now("Hm", False), closing])
        assert allowed(state) == plain

    def test_tokens_handed_over_lead_to_the_same_state(
        self, matchers: Matchers, tokenizer: Tokenizer, ids: tuple[int, int]
    ) -> None:
        opening, closing = ids
        token_ids = [opening, *tokenizer.encode_now("Hm", False), closing, *tokenizer.encode_now("no", False)]
        grammar = msgspec.structs.replace(WORDS, after=closing, opened_by=opening)
        whole = matchers.prepare(asked(grammar))
        for count, token_id in enumerate(token_ids):
            assert allowed(matchers.prepare(asked(grammar, token_ids[:count]))) == allowed(whole)
            follow(whole, [token_id])
        assert whole.is_end and matchers.prepare(asked(grammar, token_ids)).is_end

    def test_a_batch_of_both_kinds(self, matchers: Matchers, tokenizer: Tokenizer, ids: tuple[int, int]) -> None:
        free = matchers.prepare(asked(msgspec.structs.replace(WORDS, after=ids[1])))
        bound = matchers.prepare(asked(WORDS))
        for state, text in ((free, "x"), (bound, "Hello")):
            state.accept(tokenizer.encode_now(text, False))
        MASKS.compute([free, bound])
        assert len(allowed(free)) > len(allowed(bound)) > 0
