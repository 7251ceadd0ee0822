"""From a request to sequences for the engine: tokens, resolved parameters, seeds.

All that can be wrong with a request is found here or before, while nothing has been asked of the engine.

Invariants: engine request ids are ours and unique, whatever ids clients choose; every default is
resolved, a seed always drawn; a sample's parameters depend on its index and the request, never on the
other prompts.
"""

import asyncio
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TypeVar

import msgspec

from app.api.aside import aside
from app.api.constraint import prepare_grammar
from app.api.deps import SamplingDefaults, ServerContext
from app.api.reasoning import ReasoningPlan
from app.api.schemas.completions import CompletionRequest, prompt_list
from app.api.schemas.generation import GenerationRequest
from app.api.schemas.limits import GREEDY_BELOW, MAX_BAD_WORD_IDS
from app.core.errors import InvalidRequest
from app.core.types import EngineLimits, EngineRequest, Grammar, SamplingParams
from app.text.tokenizer import Tokenizer

Number = TypeVar("Number", int, float)

_DRAWN_SEED_BITS = 53
"""Every JSON reader keeps an integer of 53 bits whole."""
_UINT64 = 2**64
_ABANDON_CHECK = 256
"""Prompts that are tokenized in one go: between two goes a gone client ends the work."""
_BYTES_AN_ID = 4


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """One prompt: its ids and, where the client sent text that was not cut, that text."""

    token_ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class PreparedSequence:
    """One choice: a prompt and the engine request that goes on from it."""

    index: int
    prompt_index: int
    prompt: PreparedPrompt
    engine_request: EngineRequest


@dataclass(frozen=True, slots=True)
class PreparedGeneration:
    """A checked request, ready to be admitted."""

    request: GenerationRequest
    seed: int
    """As the client would send it to get the same answer."""
    sequences: tuple[PreparedSequence, ...]
    reasoning: ReasoningPlan | None = None


async def prepare_completion(
    request: CompletionRequest, context: ServerContext, *, limits: EngineLimits, num_bytes: int = 0, tenant: str = ""
) -> PreparedGeneration:
    """Tokenize, resolve and check against the engine's limits. Raises InvalidRequest. `num_bytes`: of the body."""
    await aside(num_bytes, check_token_fields, request, limits)
    prompts = await _prepare_prompts(request, context.tokenizer, limits, num_bytes=num_bytes)
    return await prepare_sequences(request, prompts, context, limits=limits, tenant=tenant)


async def prepare_sequences(
    request: GenerationRequest,
    prompts: Sequence[PreparedPrompt],
    context: ServerContext,
    *,
    limits: EngineLimits,
    tenant: str,
    forced: Grammar | None = None,
    reasoning: ReasoningPlan | None = None,
) -> PreparedGeneration:
    """`n` sequences for each prompt. Prefixes are shared within one `tenant` only; `forced`: of tool calls.

    With `reasoning`, a form of the output begins behind that.
    """
    seed = secrets.randbits(_DRAWN_SEED_BITS) if request.seed is None else request.seed
    bad_words = await _bad_words(request.bad_words or (), context.tokenizer)
    grammar = await prepare_grammar(request, context.grammars, forced=forced, reasoning=reasoning)
    unique = secrets.token_hex(12)
    room = limits.max_model_len
    # Made once: all sequences share its lists of ids.
    common = await aside(
        _BYTES_AN_ID * len(request.allowed_token_ids or ()),
        sampling_params,
        request,
        context.sampling_defaults,
        seed=seed,
        room=room,
        bad_words=bad_words,
    )
    common = msgspec.structs.replace(common, grammar=grammar)
    _check_some_token_is_left(common, eos_token_ids=limits.eos_token_ids)
    sequences: list[PreparedSequence] = []
    for prompt_index, prompt in enumerate(prompts):
        params = _bounded(common, room=limits.max_model_len - len(prompt.token_ids))
        for sample in range(request.num_samples):
            index = len(sequences)
            sample_params = params if sample == 0 else msgspec.structs.replace(params, seed=derive_seed(seed, sample))
            engine_request = EngineRequest(
                request_id=f"{unique}-{index}",
                prompt_token_ids=prompt.token_ids,
                params=sample_params,
                cache_salt=tenant + (request.cache_salt or ""),
                priority=0 if request.priority is None else request.priority,
            )
            sequences.append(PreparedSequence(index, prompt_index, prompt, engine_request))
    return PreparedGeneration(request, seed, tuple(sequences), reasoning)


def reseed(generation: PreparedGeneration, seed: int) -> PreparedGeneration:
    """The same with this seed in place of the one that was given or drawn."""
    num_samples = generation.request.num_samples
    sequences = []
    for sequence in generation.sequences:
        own = derive_seed(seed, sequence.index % num_samples)
        params = msgspec.structs.replace(sequence.engine_request.params, seed=own)
        engine_request = msgspec.structs.replace(sequence.engine_request, params=params)
        sequences.append(replace(sequence, engine_request=engine_request))
    return replace(generation, seed=seed, sequences=tuple(sequences))


def derive_seed(seed: int, sample: int) -> int:
    """Engine seed of sample `sample`: the seed itself for 0, else BLAKE2b-64 of both as little-endian u64."""
    key = seed % _UINT64
    if sample == 0:
        return key
    digest = blake2b(key.to_bytes(8, "little") + sample.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def sampling_params(
    request: GenerationRequest,
    defaults: SamplingDefaults,
    *,
    seed: int,
    room: int,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    """Parameters of sample 0, every default resolved. `room`: tokens that fit after the prompt."""
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    top_k = _first(request.top_k, defaults.top_k, 0)
    max_tokens = room if request.output_limit is None else min(request.output_limit, room)
    return SamplingParams(
        seed=derive_seed(seed, 0),
        max_tokens=max_tokens,
        min_tokens=min(_first(request.min_tokens, 0), max_tokens),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=max(0, top_k),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        presence_penalty=_first(request.presence_penalty, 0.0),
        frequency_penalty=_first(request.frequency_penalty, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=tuple(sorted((request.logit_bias or {}).items())),
        allowed_token_ids=tuple(sorted(set(request.allowed_token_ids or ()))),
        bad_words=bad_words,
        stop_token_ids=tuple(sorted(set(request.stop_token_ids or ()))),
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=request.num_logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs,
    )


def num_ids(params: SamplingParams) -> int:
    """Token ids that each sequence with these parameters carries beside its prompt; 4 bytes of grammar are one."""
    size = len(params.allowed_token_ids) + len(params.stop_token_ids) + 2 * len(params.logit_bias)
    size += sum(map(len, params.bad_words))
    return size if params.grammar is None else size + len(params.grammar.source.encode()) // 4


def check_token_ids(token_ids: Iterable[int], *, field: str, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first id that the model does not have."""
    ids = token_ids if isinstance(token_ids, list) else list(token_ids)
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"`{field}` holds the token id {wrong}, outside the vocabulary (0 to {vocab_size - 1}).",
            param=field.partition("[")[0],
        )


def check_text_size(texts: Sequence[str], tokenizer: Tokenizer, *, field: str, max_tokens: int) -> None:
    """Refuse a text that cannot fit, by its bytes, before any time goes into tokenizing it."""
    for text in texts:
        if tokenizer.least_num_tokens(text) > max_tokens:
            raise InvalidRequest(
                f"`{field}` holds a text of {len(text)} characters, which cannot fit into "
                f"the context of {max_tokens} tokens.",
                param=field,
                code="context_length_exceeded",
            )


def fit_prompt(
    token_ids: list[int], request: GenerationRequest, limits: EngineLimits, *, where: str, text: str | None
) -> PreparedPrompt:
    """The prompt, shortened as the request asks. Raises InvalidRequest where it leaves no room.

    `where` names the prompt in the request, `text` is what was tokenized, None where the client sent ids.
    """
    kept = _truncate(token_ids, request, limits)
    _check_prompt_length(len(kept), request, limits, where=where)
    return PreparedPrompt(tuple(kept), text if len(kept) == len(token_ids) else None)


def check_token_fields(request: GenerationRequest, limits: EngineLimits) -> None:
    """Checks against the model's context and vocabulary. Raises InvalidRequest naming the field."""
    limit = request.output_limit
    is_given = request.max_tokens is not None or request.output_limit_field != "max_tokens"
    if limit is not None and is_given and limit > limits.max_model_len:
        field = request.output_limit_field
        raise InvalidRequest(
            f"`{field}` is {limit}, more than the context of {limits.max_model_len} tokens.",
            param=field,
            code="context_length_exceeded",
        )
    size = limits.vocab_size
    check_token_ids(request.logit_bias or (), field="logit_bias", vocab_size=size)
    check_token_ids(request.allowed_token_ids or (), field="allowed_token_ids", vocab_size=size)
    check_token_ids(request.stop_token_ids or (), field="stop_token_ids", vocab_size=size)


def _check_some_token_is_left(params: SamplingParams, *, eos_token_ids: Sequence[int]) -> None:
    """Refuse what would leave the first draw without a token. Words of several tokens and grammars show later."""
    allowed = set(params.allowed_token_ids)
    if not allowed:
        return
    banned = {word[0] for word in params.bad_words if len(word) == 1}
    if allowed <= banned:
        raise InvalidRequest(
            "`bad_words` ban every token of `allowed_token_ids`: none is left to draw. Allow another.",
            param="allowed_token_ids",
        )
    if params.min_tokens and allowed <= banned | set(eos_token_ids) | set(params.stop_token_ids):
        raise InvalidRequest(
            "`min_tokens` bans the tokens that end an output, and `allowed_token_ids` allows no others: none is left "
            "to draw. Allow another, or leave `min_tokens` out.",
            param="allowed_token_ids",
        )


async def encode_prompts(
    texts: list[str],
    request: GenerationRequest,
    tokenizer: Tokenizer,
    limits: EngineLimits,
    *,
    field: str,
    add_special_tokens: bool,
) -> list[list[int]]:
    """The ids of each text; a text that cannot fit is refused before any time goes into it."""
    if request.truncate_prompt_tokens is None:
        check_text_size(texts, tokenizer, field=field, max_tokens=limits.max_model_len)
    encoded: list[list[int]] = []
    for start in range(0, len(texts), _ABANDON_CHECK):
        encoded += await tokenizer.encode(texts[start : start + _ABANDON_CHECK], add_special_tokens)
        await asyncio.sleep(0)
    return encoded


async def _prepare_prompts(
    request: CompletionRequest, tokenizer: Tokenizer, limits: EngineLimits, *, num_bytes: int
) -> list[PreparedPrompt]:
    prompts = await aside(num_bytes, prompt_list, request)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    add_special_tokens = request.add_special_tokens is not False
    encoded = await encode_prompts(
        texts, request, tokenizer, limits, field="prompt", add_special_tokens=add_special_tokens
    )
    return await aside(num_bytes, _fit_prompts, prompts, iter(encoded), request, limits)


def _fit_prompts(
    prompts: Sequence[str | list[int]],
    encoded: Iterator[list[int]],
    request: CompletionRequest,
    limits: EngineLimits,
) -> list[PreparedPrompt]:
    """Each prompt checked and shortened; `encoded` has the ids of those that are texts."""
    prepared: list[PreparedPrompt] = []
    for index, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            prepared.append(fit_prompt(next(encoded), request, limits, where=where, text=prompt))
        else:
            check_token_ids(prompt, field=where, vocab_size=limits.vocab_size)
            prepared.append(fit_prompt(prompt, request, limits, where=where, text=None))
    return prepared


def _truncate(token_ids: list[int], request: GenerationRequest, limits: EngineLimits) -> list[int]:
    limit = request.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit == -1:
        output_room = 1 if request.output_limit is None else request.output_limit
        limit = max(1, limits.max_model_len - output_room)
    if limit > limits.max_model_len:
        raise InvalidRequest(
            f"`truncate_prompt_tokens` is {limit}, more than the context of {limits.max_model_len} tokens.",
            param="truncate_prompt_tokens",
        )
    if len(token_ids) <= limit:
        return token_ids
    return token_ids[:limit] if request.truncation_side == "right" else token_ids[-limit:]


def _check_prompt_length(length: int, request: GenerationRequest, limits: EngineLimits, *, where: str) -> None:
    param = where.partition("[")[0]
    if length == 0:
        raise InvalidRequest(f"`{where}` is empty: it must hold at least one token.", param=param)
    # A prompt that is only scored needs no room for an output.
    needed = length if request.max_tokens == 0 else length + 1
    if needed > limits.max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {limits.max_model_len} tokens; `{where}` has {length} "
            "and leaves no room for an output. Shorten it, or set `truncate_prompt_tokens`.",
            param=param,
            code="context_length_exceeded",
        )


async def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences of the words, as at a text's start and as after a space (vLLM's rule).

    Words of white space alone are taken as they are.
    """
    if not words:
        return ()
    bare_texts = [word.lstrip() or word for word in words]
    spaced_texts = [text if text.isspace() else " " + text for text in bare_texts]
    encoded = await tokenizer.encode([*bare_texts, *spaced_texts], False)
    sequences: list[list[int]] = []
    for bare, spaced in zip(encoded[: len(words)], encoded[len(words) :], strict=True):
        sequences.append(bare)
        # Where the space became a token of its own, the bare sequence bans the word already.
        if spaced and bare and spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences.append(spaced)
    banned = tuple(sequence for sequence in dict.fromkeys(map(tuple, sequences)) if sequence)
    total = sum(map(len, banned))
    if total > MAX_BAD_WORD_IDS:
        raise InvalidRequest(
            f"`bad_words` are {total} tokens together; at most {MAX_BAD_WORD_IDS} are taken. Give fewer or shorter.",
            param="bad_words",
        )
    return banned


def _bounded(params: SamplingParams, *, room: int) -> SamplingParams:
    """The same with an output that fits into `room` tokens."""
    max_tokens = min(params.max_tokens, room)
    return msgspec.structs.replace(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens))


def _first(*values: Number | None) -> Number:
    """The first that is given. The last one always is."""
    return next(value for value in values if value is not None)
