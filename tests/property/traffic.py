"""Random small engines and random requests for them, from a seeded generator."""

import random

import msgspec

from app.core.types import EngineRequest, Grammar, GrammarKind
from app.scheduler import SchedulerConfig
from tests.fakes import continuation, make_request
from tests.property.driver import make_config

VOCAB_SIZE = 40
EOS_TOKEN_IDS = (0, 3)
NUM_DOCUMENTS = 3


def document(index: int) -> list[int]:
    """One of a few texts whose beginnings are prompts, so that prefixes meet."""
    return [(index * 17 + position * position * 7 + position) % VOCAB_SIZE for position in range(200)]


def random_config(rng: random.Random) -> SchedulerConfig:
    """Often too small for comfort: pools of a few blocks, budgets of a few tokens."""
    block_size = rng.choice([1, 2, 4, 8])
    return make_config(
        num_kv_blocks=rng.randint(max(2, 16 // block_size), 240 // block_size),
        block_size=block_size,
        max_model_len=rng.randint(16, 100),
        max_num_seqs=rng.randint(6, 16) if rng.random() < 0.8 else rng.randint(1, 5),
        max_num_batched_tokens=rng.choice([12, 24, 48, 100]) if rng.random() < 0.9 else rng.randint(1, 4),
        min_prefill_tokens=rng.choice([0, 0, 1, block_size]),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=EOS_TOKEN_IDS,
        enable_prefix_caching=rng.random() < 0.8,
    )


def random_request(rng: random.Random, request_id: str, *, config: SchedulerConfig) -> EngineRequest:
    """A request that fits the engine, often beginning like others, sometimes handed over."""
    prompt_len = min(rng.randint(1, 50), config.max_sequence_len - 1)
    num_own = rng.choice([0, 0, 1, prompt_len])
    prompt = document(rng.randrange(NUM_DOCUMENTS))[: prompt_len - num_own]
    prompt += [rng.randrange(VOCAB_SIZE) for _ in range(prompt_len - len(prompt))]
    request = make_request(
        request_id,
        prompt,
        max_tokens=rng.choice([0, 1, 8, 16, 30, 100]),
        seed=rng.randint(1, 2),
        cache_salt=rng.choice(["", "", "tenant"]),
        priority=rng.choice([0, 0, 0, -1, 1]),
        min_tokens=rng.choice([0, 0, 4]),
        ignore_eos=rng.random() < 0.6,
        stop_token_ids=rng.choice([(), (3, 9)]),
        num_logprobs=rng.choice([None, 1]),
        num_prompt_logprobs=rng.choice([None, None, None, 1]),
    )
    request = msgspec.structs.replace(request, tenant=rng.choice(["", "", "a", "b"]), weight=rng.choice([1.0, 3.0]))
    if rng.random() < 0.2:  # the runner of these tests draws freely all the same: it is about the wait
        params = msgspec.structs.replace(request.params, grammar=Grammar(GrammarKind.REGEX, ".*"))
        request = msgspec.structs.replace(request, params=params)
    if rng.random() >= 0.2:
        return request
    request = handed_over(request, rng.randint(0, 10), config=config)
    return msgspec.structs.replace(request, is_on_probation=rng.random() < 0.5)


def handed_over(request: EngineRequest, num_received: int, *, config: SchedulerConfig) -> EngineRequest:
    """The request as another engine would have left it after `num_received` tokens, or at its end."""
    whole = continuation(
        request,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        max_sequence_len=config.max_sequence_len,
    )
    return EngineRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        params=request.params,
        output_token_ids=whole.token_ids[:num_received],
        cache_salt=request.cache_salt,
        priority=request.priority,
        tenant=request.tenant,
        weight=request.weight,
    )
