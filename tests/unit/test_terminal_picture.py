"""The picture of the demo: drawn of what was printed, without anything from another host, and shown in README."""

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from app.terminal.demo_report import judge, show_head, show_round, show_verdict
from app.terminal.demo_round import Kill, Outcome, Round
from scripts.record_demo import PICTURE, recorder, to_svg

ROOT = Path(__file__).parents[2]


def words_of(picture: str) -> str:
    """All text of an SVG, spaces as one."""
    return " ".join("".join(ElementTree.fromstring(picture).itertext()).split())


def picture_of(*texts: str) -> str:
    """Of a recorded run with these texts."""
    console = recorder(io.StringIO())
    one = Round("one after another", tuple(Outcome(text, "stop", None, 0.1) for text in texts), 1.0, ())
    other = one._replace(name="together, 5 × kill -9", kills=(Kill(4321, 1234, 0.5), Kill(4322, 2345, None)))
    show_head(console, (f"{len(texts)} prompts",))
    show_round(console, one)
    show_round(console, other)
    show_verdict(console, (one, other), judge((one, other), is_promised=True), notes=("<b>&amp;",))
    return to_svg(console)


def test_a_recorded_run_becomes_a_picture() -> None:
    picture = picture_of("a", "你好")
    words = words_of(picture)
    assert "kill -9 4321 after 1,234 characters: all streams moved again after 0.50 s" in words
    assert "Two equal hashes:" in words and "<b>&amp;" in words
    assert picture == picture_of("a", "你好") != picture_of("a", "你好!")
    assert not re.search(r"url\((?!#)|https?://(?!www\.w3\.org/2000/svg|www\.textualize\.io)", picture)


def test_readme_shows_the_picture_of_this_demo() -> None:
    assert "docs/images/demo.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
    words = words_of(PICTURE.read_text(encoding="utf-8"))
    head = words_of(picture_of("a")).partition("round")[2].partition("one after")[0]
    assert head.strip() in words and "together, 5 × kill -9 16/16" in words
    assert len(set(re.findall(r"16/16 ([0-9a-f]{16})", words))) == 1 and "Three equal hashes:" in words
