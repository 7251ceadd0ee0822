"""README.md and README.zh-CN.md say the same: the same commands, links, names and shape. Words are not compared."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TESTED = re.compile(r"<!-- tested -->\n```\w+\n.*?```", re.DOTALL)


def test_commands_are_the_same() -> None:
    def commands(text: str) -> list[str]:
        """All blocks of code without their comments, which are translated."""
        return [re.sub(r"\s+#.*$", "", block, flags=re.MULTILINE) for block in FENCE.findall(text)]

    assert commands(CHINESE) == commands(ENGLISH)
    assert TESTED.findall(CHINESE) == TESTED.findall(ENGLISH) != []


def test_links_and_pictures_are_the_same() -> None:
    def targets(text: str) -> list[str]:
        found = re.findall(r"\]\(([^)]+)\)|src(?:set)?=\"([^\"]+)\"", FENCE.sub("", text))
        return sorted("".join(pair) for pair in found if not "".join(pair).startswith("README"))

    assert targets(CHINESE) == targets(ENGLISH)
    assert "](README.zh-CN.md)" in ENGLISH and "](README.md)" in CHINESE


def test_names_set_as_code_are_the_same() -> None:
    def names(text: str) -> list[str]:
        return sorted(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))

    assert names(CHINESE) == names(ENGLISH)


def test_the_shape_is_the_same() -> None:
    def shape(text: str) -> tuple[list[str], int, int]:
        plain = FENCE.sub("", text)
        headings = re.findall(r"^#+ ", plain, re.MULTILINE)
        return headings, len(re.findall(r"^\|", plain, re.MULTILINE)), len(re.findall(r"^- ", plain, re.MULTILINE))

    assert shape(CHINESE) == shape(ENGLISH)


def test_figures_are_the_same() -> None:
    """Of two digits or more, such as ports and sizes: small numbers are spelt out."""

    def figures(text: str) -> set[str]:
        return set(re.findall(r"\d+(?:[.:]\d+)+|\d{2,}", FENCE.sub("", text)))

    assert figures(CHINESE) == figures(ENGLISH)
