"""Reads a corpus: text files and JSON lines become documents, each once, in an order that the names fix.

A document is the whole of a .txt, .md or .rst file, or the `text` of one line of a .jsonl file; each may be
gzipped. Folders are walked. Equal documents are kept once; empty ones are left out.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.core.errors import ConfigurationError

TEXT_SUFFIXES = frozenset([".txt", ".md", ".rst"])
LINES_SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents and what was left out."""

    documents: tuple[str, ...]
    num_bytes: int
    """Of the documents that are kept, in UTF-8."""
    num_files: int
    num_duplicates: int


def read_corpus(places: Sequence[Path]) -> Corpus:
    """Read every document below the given files and folders.

    Raises:
        ConfigurationError: nothing to read, a file that is no UTF-8 or that vanished, or a line that is no JSON.
    """
    files = [file for place in places for file in text_files(place)]
    seen: set[bytes] = set()
    documents, num_duplicates, num_bytes = [], 0, 0
    for file in files:
        for document in _documents(file):
            data = document.encode()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest in seen:
                num_duplicates += 1
                continue
            seen.add(digest)
            documents.append(document)
            num_bytes += len(data)
    if not documents:
        raise ConfigurationError(
            f"the corpus is empty: no text in {len(files)} files of {', '.join(map(str, places))}; "
            f"give files or folders with {', '.join(sorted(TEXT_SUFFIXES))} or {LINES_SUFFIX}"
        )
    return Corpus(documents=tuple(documents), num_bytes=num_bytes, num_files=len(files), num_duplicates=num_duplicates)


def text_files(place: Path) -> list[Path]:
    """The file itself, or those of a folder that this module reads, by name.

    Raises:
        ConfigurationError: nothing is there.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ConfigurationError(f"{place} is not there: give a text file or a folder of them")
    return sorted(
        file for file in place.rglob("*") if file.is_file() and suffix_of(file) in {*TEXT_SUFFIXES, LINES_SUFFIX}
    )


def suffix_of(file: Path) -> str:
    """Without .gz."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def _documents(file: Path) -> Iterator[str]:
    text = read_text(file)
    if suffix_of(file) != LINES_SUFFIX:
        yield from filter(str.strip, [text])
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            document = _line_text(line, place=f"{file}, line {number}")
            if document.strip():
                yield document


def read_text(file: Path) -> str:
    """The whole of a file, unpacked.

    Raises:
        ConfigurationError: it is no UTF-8, no gzip, or cannot be read.
    """
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{file} is no UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; convert it or leave it out"
        ) from error
    except (OSError, EOFError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}; nothing was written") from error


def _line_text(line: str, *, place: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f'{place} is no JSON object with a "text" of valid Unicode: {error}') from error
    return str(text)
