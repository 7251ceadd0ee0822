"""How a text is cut for scoring, and what cannot be measured."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from app.cli import main
from app.training.evaluation.perplexity import score_texts
from app.training.evaluation.scorer import Generation, Scores, TokenIds, windows


@pytest.mark.parametrize(("num_tokens", "context"), [(2, 8), (8, 8), (9, 8), (40, 8), (41, 7), (5, 2), (1, 8)])
def test_windows_score_each_token_once_with_half_a_context_before_it(num_tokens: int, context: int) -> None:
    scored: list[int] = []
    for begin, end, first in windows(num_tokens, context=context):
        assert 2 <= end - begin <= context and begin < first < end
        assert first == 1 or first - begin >= context // 2
        scored += range(first, end)
    assert scored == list(range(1, num_tokens))


class Letters:
    """A tokenizer of ordinals without a start token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class Halves:
    """Gives every token half of what is left, and notes what it was asked."""

    context = 4

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def score(self, sequences: Sequence[TokenIds]) -> list[Scores]:
        self.asked += map(list, sequences)
        return [Scores((-1.0,) * (len(ids) - 1), (True,) * (len(ids) - 1)) for ids in sequences]

    def generate(self, generations: Sequence[Generation]) -> list[str]:
        raise NotImplementedError


def test_documents_are_scored_apart_and_from_their_first_token() -> None:
    scorer = Halves()
    score = score_texts(scorer, Letters(), ["abcdef", "", "ß"], start_id=1)
    assert scorer.asked == [[1, 97, 98, 99], [98, 99, 100, 101], [100, 101, 102], [1, 223]]
    assert (score.num_documents, score.num_tokens, score.num_bytes, score.loss) == (2, 7, 8, 1.0)
    assert score.bits_per_byte == pytest.approx(7 / 8 / 0.6931, rel=1e-3)


def test_what_cannot_be_measured_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("The river.")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    text = ["--text", str(tmp_path / "text.txt")]
    cases: list[tuple[list[str], str]] = [
        (["rill-stories-3m"], "nothing to measure by"),
        (["rill-stories-3m", "--text", str(tmp_path / "gone")], "gone is not there"),
        (["rill-stories-3m", "--text", str(tmp_path / "bad.txt")], "is no UTF-8: byte 0"),
        (["rill-stories-3m", "--tasks", str(tmp_path / "none")], "no folder of task files"),
        (["rill-stories-3m", *text, "--url", "http://127.0.0.1:9"], "no server that lists models answers at"),
        (["rill-stories-3m", *text, "--out", str(tmp_path / "none" / "report.json")], "the report cannot be written"),
        ([str(tmp_path), *text], "config.json"),
    ]
    for arguments, message in cases:
        assert main(["evaluate", *arguments]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1, errors
