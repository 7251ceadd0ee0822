"""The whole of `headwater tokenizer`: corpus → tokenizer and shards in one folder, and a summary to read."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from app.core.errors import ConfigurationError
from app.training.corpus import Corpus, read_corpus
from app.training.shards import ShardFacts, write_shards
from app.training.tokenizer import CHAT_TEMPLATE, train_tokenizer, write_tokenizer

_SAMPLE_CHARACTERS = 120


def prepare(
    places: Sequence[Path], out: Path, *, vocab_size: int, heldout_share: float, seed: int, chat_template: Path | None
) -> str:
    """Write the folder `out` and return the summary.

    Raises:
        ConfigurationError: the corpus cannot be used, or `out` cannot be written.
    """
    if not 0 < heldout_share < 1:
        raise ConfigurationError(f"--heldout {heldout_share} is no share of the documents between 0 and 1")
    corpus = read_corpus(places)
    try:
        template = CHAT_TEMPLATE if chat_template is None else chat_template.read_text(encoding="utf-8")
        tokenizer = train_tokenizer(corpus.documents, vocab_size=vocab_size)
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(tokenizer, out, chat_template=template)
        facts = write_shards(corpus.documents, tokenizer, out, heldout_share=heldout_share, seed=seed)
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written whole: {error}; run the command again") from error
    return _summary(corpus, facts, tokenizer)


def _summary(corpus: Corpus, facts: ShardFacts, tokenizer: tokenizers.Tokenizer) -> str:
    num_tokens = facts.train.num_tokens + facts.heldout.num_tokens
    sample = corpus.documents[0][:_SAMPLE_CHARACTERS]
    pieces = [tokenizer.decode([token_id]) for token_id in tokenizer.encode(sample, add_special_tokens=False).ids]
    lines = [
        f"{corpus.num_files} files, {len(corpus.documents)} documents ({corpus.num_duplicates} duplicates left out), "
        f"{corpus.num_bytes / 1e6:.2f} MB",
        f"vocabulary {facts.vocab_size}; {num_tokens:,} tokens, {corpus.num_bytes / num_tokens:.2f} bytes a token",
        f"train {facts.train.num_documents} documents, {facts.train.num_tokens:,} tokens; "
        f"held out {facts.heldout.num_documents} documents, {facts.heldout.num_tokens:,} tokens",
        f"sample: {'|'.join(pieces)!r}",
    ]
    return "\n".join(lines)
