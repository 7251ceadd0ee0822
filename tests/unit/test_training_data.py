"""Corpus → tokenizer → shards → packed rows: what is kept, what is refused, and that nothing is lost on the way."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from app.core.errors import ConfigurationError
from app.training.corpus import read_corpus, read_text
from app.training.packing import NO_LABEL, PackedRows
from app.training.prepare import prepare
from app.training.shards import open_shards
from app.training.tokenizer import END, START, load_tokenizer, train_tokenizer
from tests.training_texts import make_shards, write_stories


def test_corpus_reads_text_lines_and_gzip_each_document_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second\\nline"}\n\n{"text": "first"}\n{"text": " "}\n')
    (tmp_path / "c.md.gz").write_bytes(gzip.compress("dritte ß".encode()))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    corpus = read_corpus([tmp_path])
    assert corpus.documents == ("first", "second\nline", "dritte ß")
    assert (corpus.num_files, corpus.num_duplicates, corpus.num_bytes) == (3, 1, 5 + 11 + 9)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", "a.txt is no UTF-8: byte 5 is 0xff"),
        ("a.txt", b" \n ", "the corpus is empty: no text in 1 files"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1}', "a.jsonl, line 2 is no JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1 is no JSON object"),
        ("a.txt.gz", b"no gzip", "a.txt.gz cannot be read"),
    ],
)
def test_corpus_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_corpus([tmp_path])


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigurationError, match=r"gone.txt is not there"):
        read_corpus([tmp_path / "gone.txt"])


def test_a_file_that_vanishes_while_the_corpus_is_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone.txt cannot be read: .*; nothing was written"):
        read_text(tmp_path / "gone.txt")


@pytest.mark.parametrize("name", ["tokenizer.json", "train.bin", "heldout.offsets.npy"])
def test_a_full_disk_is_told_in_one_line_and_leaves_no_shards_that_look_whole(tmp_path: Path, name: str) -> None:
    corpus, out = write_stories(tmp_path / "corpus", num_documents=4), tmp_path / "data"
    out.mkdir()
    (out / name).symlink_to("/dev/full")
    with pytest.raises(ConfigurationError, match=r"cannot be written whole: .*No space left on device"):
        prepare([corpus], out, vocab_size=300, heldout_share=0.3, seed=1, chat_template=None)
    with pytest.raises(ConfigurationError, match="has no whole token shards"):
        open_shards(out)


def test_tokenizer_gives_every_text_back_and_reads_no_special_token_in_it(tmp_path: Path) -> None:
    folder = make_shards(tmp_path)
    tokenizer = load_tokenizer(folder)
    for text in ("The heron, twice.  \n\n\tß 漢字 🙂", f"a {END} b{START}", ""):
        ids = tokenizer.encode(text).ids
        assert ids[0] == tokenizer.token_to_id(START)
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
        assert all(token_id > 3 for token_id in ids[1:])


def test_tokenizer_needs_room_for_the_bytes() -> None:
    with pytest.raises(ConfigurationError, match="--vocab-size 100 has no room"):
        train_tokenizer(["text"], vocab_size=100)


def test_shards_hold_every_document_once(tmp_path: Path) -> None:
    corpus = write_stories(tmp_path / "corpus", num_documents=40)
    summary = prepare([corpus], tmp_path / "data", vocab_size=300, heldout_share=0.1, seed=1, chat_template=None)
    assert "40 documents" in summary and "bytes a token" in summary
    shards = open_shards(tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data")
    assert (shards.train.facts.num_documents, shards.heldout.facts.num_documents) == (36, 4)
    texts = [
        tokenizer.decode(split.document(index).tolist())
        for split in (shards.train, shards.heldout)
        for index in range(split.facts.num_documents)
    ]
    assert sorted(texts) == sorted(read_corpus([corpus]).documents)
    assert shards.train.tokens.dtype == np.uint16


def test_shards_without_their_own_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = make_shards(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    with pytest.raises(ConfigurationError, match="is not the tokenizer that made the shards"):
        open_shards(folder)
    (folder / "train.bin").write_bytes(b"ab")
    with pytest.raises(ConfigurationError, match=r"train.bin holds 1 tokens"):
        open_shards(folder)


def test_one_epoch_reads_every_token_once_and_no_label_crosses_documents(tmp_path: Path) -> None:
    split = open_shards(make_shards(tmp_path)).train
    rows = PackedRows(split, context=32, seed=9)
    epoch = rows.rows(0, rows.rows_per_epoch)
    seen = np.bincount(epoch.token_ids.ravel(), minlength=320)
    there = np.bincount(split.tokens, minlength=320)
    assert epoch.token_ids.size > len(split.tokens) - 33
    assert ((there - seen) >= 0).all() and (there - seen).sum() == len(split.tokens) - epoch.token_ids.size
    starts = epoch.token_ids == 1
    assert (epoch.positions[starts] == 0).all()
    inside = epoch.labels[:, :-1] != NO_LABEL
    assert (epoch.labels[:, :-1][inside] == epoch.token_ids[:, 1:][inside]).all()
    assert (inside == (epoch.documents[:, 1:] == epoch.documents[:, :-1])).all()
    assert not (epoch.labels == 1).any()


def test_rows_follow_from_their_numbers_and_epochs_differ(tmp_path: Path) -> None:
    split = open_shards(make_shards(tmp_path)).train
    rows, again = PackedRows(split, context=32, seed=9), PackedRows(split, context=32, seed=9)
    first = rows.rows_per_epoch - 1
    ahead = rows.rows(first, 3)
    assert (again.rows(first + 1, 1).token_ids == ahead.token_ids[1]).all()
    assert (rows.rows(0, 4).token_ids != rows.rows(rows.rows_per_epoch, 4).token_ids).any()
    with pytest.raises(ConfigurationError, match="less than one row"):
        PackedRows(split, context=1 << 20, seed=9)
