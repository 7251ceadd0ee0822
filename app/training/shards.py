"""Token shards: two files of ids, `train.bin` and `heldout.bin`, read through the page cache, never loaded whole.

Each document is the start token, its tokens and the end token; documents lie in an order shuffled by the seed, and
`*.offsets.npy` says where each begins. Ids are uint16 where the vocabulary fits, else uint32. `shards.json` describes
both splits and names the tokenizer by its hash; it is written last, so a folder with it is whole.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray

from app.core.errors import ConfigurationError
from app.training.tokenizer import END, special_id

DESCRIPTION = "shards.json"
SPLITS = ("train", "heldout")
_BATCH_DOCUMENTS = 256
Tokens = NDArray[np.uint16] | NDArray[np.uint32]


class SplitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one split."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    """Of text, in UTF-8."""


class ShardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`shards.json`."""

    vocab_size: int
    dtype: str
    seed: int
    tokenizer_sha256: str
    train: SplitFacts
    heldout: SplitFacts


@dataclass(frozen=True)
class Split:
    """Tokens and where documents begin, both memory-mapped."""

    facts: SplitFacts
    tokens: Tokens  # (num_tokens,)
    offsets: NDArray[np.int64]  # (num_documents + 1,)

    def document(self, index: int) -> Tokens:
        """The ids of one document, start and end tokens included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Shards:
    """A folder of shards, opened."""

    folder: Path
    facts: ShardFacts
    train: Split
    heldout: Split


def write_shards(
    documents: Sequence[str], tokenizer: tokenizers.Tokenizer, folder: Path, *, heldout_share: float, seed: int
) -> ShardFacts:
    """Tokenize, shuffle, split and write. At least one document goes to each split.

    Args:
        heldout_share: of the documents, in 0..1.

    Raises:
        ConfigurationError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ConfigurationError("the corpus has one document; at least two are needed, one of them held out")
    order = np.random.default_rng(seed).permutation(len(documents))
    num_heldout = min(max(round(len(documents) * heldout_share), 1), len(documents) - 1)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    splits = {}
    for name, indices in zip(SPLITS, (order[num_heldout:], order[:num_heldout]), strict=True):
        splits[name] = _write_split([documents[index] for index in indices], tokenizer, folder / name, dtype=dtype)
    facts = ShardFacts(
        vocab_size=tokenizer.get_vocab_size(),
        dtype=dtype.name,
        seed=seed,
        tokenizer_sha256=_sha256(folder / "tokenizer.json"),
        train=splits["train"],
        heldout=splits["heldout"],
    )
    (folder / DESCRIPTION).write_bytes(msgspec.json.format(msgspec.json.encode(facts)) + b"\n")
    return facts


def open_shards(folder: Path) -> Shards:
    """Map the files of a folder.

    Raises:
        ConfigurationError: a file is missing, damaged, or the tokenizer beside them is another one.
    """
    try:
        facts = msgspec.json.decode((folder / DESCRIPTION).read_bytes(), type=ShardFacts)
        tokenizer_sha256 = _sha256(folder / "tokenizer.json")
        train, heldout = (_open_split(folder / name, getattr(facts, name), facts.dtype) for name in SPLITS)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise ConfigurationError(
            f"{folder} has no whole token shards: {error}; make them with `headwater tokenizer`"
        ) from error
    if tokenizer_sha256 != facts.tokenizer_sha256:
        raise ConfigurationError(
            f"{folder / 'tokenizer.json'} is not the tokenizer that made the shards beside it; "
            "run `headwater tokenizer` again"
        )
    return Shards(folder, facts, train, heldout)


def _write_split(
    documents: Sequence[str], tokenizer: tokenizers.Tokenizer, stem: Path, *, dtype: np.dtype[Any]
) -> SplitFacts:
    end = special_id(tokenizer, END)
    offsets = [0]
    with stem.with_suffix(".bin").open("wb") as file:
        for first in range(0, len(documents), _BATCH_DOCUMENTS):
            for encoding in tokenizer.encode_batch(list(documents[first : first + _BATCH_DOCUMENTS])):
                ids = np.array([*encoding.ids, end], dtype)
                file.write(ids.tobytes())
                offsets.append(offsets[-1] + len(ids))
    np.save(stem.with_suffix(".offsets.npy"), np.array(offsets, np.int64))
    num_bytes = sum(len(document.encode()) for document in documents)
    return SplitFacts(num_documents=len(documents), num_tokens=offsets[-1], num_bytes=num_bytes)


def _open_split(stem: Path, facts: SplitFacts, dtype: str) -> Split:
    tokens = np.memmap(stem.with_suffix(".bin"), dtype=dtype, mode="r")
    offsets = np.load(stem.with_suffix(".offsets.npy"), mmap_mode="r")
    if len(tokens) != facts.num_tokens or offsets[-1] != len(tokens):
        raise ValueError(f"{stem.name}.bin holds {len(tokens)} tokens, not {facts.num_tokens}")
    return Split(facts, tokens, offsets)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
