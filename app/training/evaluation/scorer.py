"""What a measure asks of a model, wherever the model is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Scores:
    """Of one sequence of tokens; both have one entry for each token but the first."""

    logprobs: tuple[float, ...]
    """Natural logarithms of the probability of the token that came."""
    is_first: tuple[bool, ...]
    """Whether no other token was more probable."""


@dataclass(frozen=True)
class Generation:
    """Greedy output that is asked for."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...]
    """Texts that end the output and are left out of it."""


class Scorer(Protocol):
    """A model that scores and continues tokens."""

    @property
    def context(self) -> int:
        """The most tokens that it scores at once."""

    def score(self, sequences: Sequence[TokenIds]) -> list[Scores]:
        """Scores of each sequence, of 2 to `context` tokens, in order."""

    def generate(self, generations: Sequence[Generation]) -> list[str]:
        """The text of each, in order."""


def windows(num_tokens: int, *, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored) of pieces that score each token but the first once.

    Each token sees at least half a context of what is before it, where there is so much.
    """
    stride, scored, begin = max(context // 2, 1), 1, 0
    while scored < num_tokens:
        end = min(begin + context, num_tokens)
        yield begin, end, scored
        scored, begin = end, begin + stride
