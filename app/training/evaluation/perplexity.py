"""Perplexity and bits a byte of text, each document by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.core.errors import ConfigurationError
from app.training.evaluation.scorer import Scorer, windows


@dataclass(frozen=True)
class TextScore:
    """Over all documents."""

    num_documents: int
    num_tokens: int
    """That were scored: all but what begins a document."""
    num_bytes: int
    loss: float
    """Nats a token."""

    @property
    def perplexity(self) -> float:
        """As if the model chose among so many equal tokens."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """The figure to compare between tokenizers."""
        return self.loss / math.log(2) * self.num_tokens / self.num_bytes


def score_texts(scorer: Scorer, tokenizer: Any, texts: Sequence[str], *, start_id: int) -> TextScore:
    """Score each text from its first token on.

    Args:
        start_id: what stands before a text where the tokenizer puts nothing there.

    Raises:
        ConfigurationError: there is no text.
    """
    pieces: list[tuple[list[int], int]] = []
    num_bytes = 0
    for text in filter(None, texts):
        ids = list(tokenizer(text)["input_ids"])
        has_start = ids[:1] == [start_id]
        ids = ids if has_start else [start_id, *ids]
        num_bytes += len(text.encode())
        for begin, end, scored in windows(len(ids), context=scorer.context):
            pieces.append((ids[begin:end], scored - begin))
    if not pieces:
        raise ConfigurationError("there is no text to score")
    scores = scorer.score([ids for ids, _ in pieces])
    chosen = [logprob for one, (_, first) in zip(scores, pieces, strict=True) for logprob in one.logprobs[first - 1 :]]
    return TextScore(len(list(filter(None, texts))), len(chosen), num_bytes, -math.fsum(chosen) / len(chosen))
