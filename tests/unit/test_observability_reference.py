"""The page of metrics is the registry's."""

from pathlib import Path

from app.observability.reference import reference_page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference_page(), "python -m app.observability.reference > docs/reference/metrics.md"


def test_every_row_says_what_it_means() -> None:
    rows = [line.split(" | ") for line in reference_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 25 and all(len(row) == 4 and row[3].endswith(". |") for row in rows)
