"""From a request to sequences: seeds, prompts, bad words."""

from hashlib import blake2b

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from app.api.deps import OpenAIDefaults, ServerContext
from app.api.schemas.completions import CompletionRequest
from app.api.translate import PreparedGeneration, derive_seed, num_ids, prepare_completion
from app.core.errors import InvalidRequest
from app.core.types import Grammar, GrammarKind
from app.text import Tokenizer
from tests.contract.fake_engine import FakeEngine, fake_limits
from tests.contract.serving import make_context
from tests.text_tokenizers import byte_fallback, byte_level


async def prepare(request: CompletionRequest, tokenizer: Tokenizer) -> PreparedGeneration:
    limits = fake_limits(vocab_size=tokenizer.vocab_size, max_model_len=64)
    context: ServerContext = make_context(
        FakeEngine((5,), limits), tokenizer=tokenizer, defaults=OpenAIDefaults(temperature=0.5)
    )
    return await prepare_completion(request, context, limits=limits)


def test_seeds_of_samples_are_as_documented() -> None:
    assert derive_seed(7, 0) == 7 and derive_seed(-1, 0) == 2**64 - 1
    digest = blake2b((7).to_bytes(8, "little") + (3).to_bytes(8, "little"), digest_size=8).digest()
    assert derive_seed(7, 3) == int.from_bytes(digest, "little")
    # Pinned: a change breaks everybody's reproducible answers.
    assert derive_seed(7, 1) == 14818979533484651488


async def test_a_sample_depends_neither_on_n_nor_on_other_prompts() -> None:
    alone = await prepare(CompletionRequest(prompt="你好", seed=7, n=2), byte_level())
    among = await prepare(CompletionRequest(prompt=["a", "你好"], seed=7, n=4), byte_level())
    assert [one.engine_request.params for one in alone.sequences] == [
        one.engine_request.params for one in among.sequences[4:6]
    ]
    assert [(one.index, one.prompt_index) for one in among.sequences] == [(i, i // 4) for i in range(8)]


async def test_ids_are_unique_and_drawn_seeds_differ() -> None:
    request = CompletionRequest(prompt="a", n=2, request_id="same")
    first, second = await prepare(request, byte_level()), await prepare(request, byte_level())
    ids = [one.engine_request.request_id for prepared in (first, second) for one in prepared.sequences]
    assert len(set(ids)) == 4 and first.seed != second.seed


async def test_everything_of_the_engine_request_is_passed_on() -> None:
    request = CompletionRequest(prompt="a", cache_salt="salt", priority=-3, temperature=None)
    (sequence,) = (await prepare(request, byte_level())).sequences
    assert (sequence.engine_request.cache_salt, sequence.engine_request.priority) == ("salt", -3)
    assert sequence.engine_request.params.temperature == 0.5


async def test_bytes_without_a_token_do_not_make_a_prompt_too_long() -> None:
    library = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(library, special_tokens={})
    (sequence,) = (await prepare(CompletionRequest(prompt="ab" + "\x04" * 5000), tokenizer)).sequences
    assert sequence.prompt.token_ids == (2,)
    with pytest.raises(InvalidRequest, match="characters"):
        await prepare(CompletionRequest(prompt="ab" * 2500), tokenizer)


async def test_bad_words_are_banned_at_a_start_and_after_a_space() -> None:
    tokenizer = byte_level()
    prepared = await prepare(CompletionRequest(prompt="a", bad_words=["quick", "quick", "你好"]), tokenizer)
    sequences = prepared.sequences[0].engine_request.params.bad_words
    assert tuple(tokenizer.encode_now("quick", False)) in sequences
    assert tuple(tokenizer.encode_now("你好", False)) in sequences
    assert len(set(sequences)) == len(sequences)


async def test_sequences_share_the_ids_of_their_parameters() -> None:
    request = CompletionRequest(
        prompt=["a", "ab"], n=2, allowed_token_ids=list(range(300)), bad_words=["quick"], max_tokens=9, min_tokens=9
    )
    params = [one.engine_request.params for one in (await prepare(request, byte_level())).sequences]
    for name in ("allowed_token_ids", "bad_words"):
        assert len({id(getattr(one, name)) for one in params}) == 1


async def test_output_bounds_are_those_of_each_prompt() -> None:
    request = CompletionRequest(prompt=[[5] * 60, [5] * 10], max_tokens=50, min_tokens=40)
    params = [one.engine_request.params for one in (await prepare(request, byte_level())).sequences]
    assert [(one.max_tokens, one.min_tokens) for one in params] == [(4, 4), (50, 40)]


@pytest.mark.parametrize("word", ["\n", " ", "\n\n", "\t"])
async def test_bad_words_of_white_space_are_banned_as_they_are(word: str) -> None:
    tokenizer = byte_level()
    (sequence,) = (await prepare(CompletionRequest(prompt="a", bad_words=[word, "x"]), tokenizer)).sequences
    banned = sequence.engine_request.params.bad_words
    assert tuple(tokenizer.encode_now(word, False)) in banned
    assert tuple(tokenizer.encode_now("x", False)) in banned
    assert tuple(tokenizer.encode_now(" " + word, False)) not in banned


async def test_all_bad_words_together_are_bounded() -> None:
    words = [chr(0x4E00 + index) * 1024 for index in range(10)]
    with pytest.raises(InvalidRequest, match="16384") as refused:
        await prepare(CompletionRequest(prompt="a", bad_words=words), byte_level())
    assert refused.value.param == "bad_words"


async def test_all_ids_of_the_parameters_are_counted() -> None:
    request = CompletionRequest(
        prompt="a", allowed_token_ids=[1, 2], stop_token_ids=[3], logit_bias={4: 1.0}, bad_words=["x"]
    )
    (sequence,) = (await prepare(request, byte_level())).sequences
    params = sequence.engine_request.params
    assert num_ids(params) == 2 + 1 + 2 + sum(map(len, params.bad_words))
    grammar = Grammar(kind=GrammarKind.REGEX, source="é" * 100)
    assert num_ids(msgspec.structs.replace(params, grammar=grammar)) == num_ids(params) + 50


async def test_a_prompt_of_exactly_the_context_can_be_scored_and_not_continued() -> None:
    ids: list[str | int | list[int]] = [5] * 64
    scored = await prepare(CompletionRequest(prompt=ids, max_tokens=0, echo=True), byte_level())
    assert scored.sequences[0].engine_request.params.max_tokens == 0
    with pytest.raises(InvalidRequest, match="maximum context length is 64"):
        await prepare(CompletionRequest(prompt=ids), byte_level())
    continued = await prepare(CompletionRequest(prompt=ids[1:], max_tokens=9), byte_level())
    assert continued.sequences[0].engine_request.params.max_tokens == 1


async def test_a_text_that_cannot_fit_is_refused_by_its_bytes_where_text_never_shrinks() -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        with pytest.raises(InvalidRequest) as refused:
            await prepare(CompletionRequest(prompt="你好" * 5000), tokenizer)
        assert refused.value.param == "prompt" and refused.value.code == "context_length_exceeded"


async def test_the_text_is_kept_for_the_echo_unless_it_was_cut() -> None:
    whole = await prepare(CompletionRequest(prompt="Hey you"), byte_level())
    assert whole.sequences[0].prompt.text == "Hey you"
    cut = await prepare(CompletionRequest(prompt="Hey you", truncate_prompt_tokens=2), byte_level())
    assert cut.sequences[0].prompt.text is None
