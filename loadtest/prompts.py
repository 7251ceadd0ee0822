"""What requests ask: prompts of a given length from a seed, with a prefix shared by all if wanted.

Each prompt depends on (seed, index) alone, so two runs with one seed send the same prompts in the same
order, and a second run against a server with a prefix cache finds them all there: change the seed.
"""

import random

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house service"
)
_WORDS = tuple(_TEXT.split())
_FIRST_ID = 256
"""Lower ids are often control tokens."""


def word_prompt(num_words: int, *, shared: float, seed: int, index: int) -> str:
    """Common English words, about one token each; the first `shared` part is the same for every index."""
    num_shared = round(num_words * shared)
    words = random.Random(f"shared {seed}").choices(_WORDS, k=num_shared)
    words += random.Random(f"prompt {seed} {index}").choices(_WORDS, k=num_words - num_shared)
    return " ".join(words)


def token_prompt(num_tokens: int, *, shared: float, seed: int, index: int, vocab_size: int) -> list[int]:
    """Exactly `num_tokens` random ids below `vocab_size`; the first `shared` part is the same for every index."""
    ids = range(min(_FIRST_ID, vocab_size // 2), vocab_size)
    num_shared = round(num_tokens * shared)
    prompt = random.Random(f"shared {seed}").choices(ids, k=num_shared)
    return prompt + random.Random(f"prompt {seed} {index}").choices(ids, k=num_tokens - num_shared)
