"""Makes the corpus of this model: the pages of the SQLite and PostgreSQL manuals as plain text, one file each.

    apt-get download sqlite3-doc postgresql-doc-15 && for deb in *.deb; do dpkg-deb -x "$deb" unpacked; done
    python prepare.py unpacked corpus

Navigation, scripts and repeated paragraphs are left out; blank lines divide paragraphs; code keeps its lines.
"""

import argparse
import gzip
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

SOURCES = {
    "sqlite": ("usr/share/doc/sqlite3", "public-domain"),
    "postgresql": ("usr/share/doc/postgresql-doc-15/html", "PostgreSQL"),
}
"""Where the pages lie, and their licence as the package's copyright file states it."""
SKIPPED_PAGES = re.compile(
    r"(keyword_index|sitemap|bookindex|index|docs|doclist|hlr\d+|doc_.*|requirements|capi3ref|changes|chronology)\.html"
)
"""Lists of links, tables of contents, and pages that hold other pages once more."""
BLOCKS = frozenset(
    ["p", "div", "ul", "ol", "dl", "table", "tr", "blockquote", "pre", "center", "section", "header", "hr"]
    + [f"h{level}" for level in range(1, 7)]
)
LINES = frozenset(["br", "li", "dt", "dd"])
DROPPED = frozenset(["script", "style", "svg", "head", "button", "form"])
DROPPED_CLASSES = frozenset(["nosearch", "navheader", "navfooter", "toc", "fancy_toc", "menu", "toct", "pikchr-svg"])
VOID = frozenset(["br", "hr", "img", "input", "meta", "link", "col", "area", "base", "wbr"])
LEAST_CHARACTERS = 200
REPEATED_CHARACTERS = 160
"""A paragraph this long that stood in an earlier page is left out: held-out pages share no long text with others."""


class PageText(HTMLParser):
    """Collects the text of one page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._in_pre = 0
        self._dropped_tag: str | None = None
        self._dropped_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropped_tag is not None:
            self._dropped_depth += tag == self._dropped_tag and tag not in VOID
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in VOID and (tag in DROPPED or classes & DROPPED_CLASSES):
            self._dropped_tag, self._dropped_depth = tag, 1
            return
        self._in_pre += tag == "pre"
        self._mark(tag)
        if tag == "td" or tag == "th":
            self._pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._dropped_tag is not None:
            self._dropped_depth -= tag == self._dropped_tag
            if not self._dropped_depth:
                self._dropped_tag = None
            return
        self._mark(tag)
        if tag == "pre":
            self._in_pre = max(self._in_pre - 1, 0)

    def handle_data(self, data: str) -> None:
        if self._dropped_tag is None:
            self._pieces.append(data if self._in_pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """Paragraphs without trailing blanks or runs of empty lines."""
        lines = [re.sub(r"[ \t\xa0]+$", "", line) for line in "".join(self._pieces).replace("\xa0", " ").split("\n")]
        lines = [line if line.startswith("  ") else line.strip() for line in lines]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def _mark(self, tag: str) -> None:
        if tag in BLOCKS:
            self._pieces.append("\n\n")
        elif tag in LINES:
            self._pieces.append("\n")


def page_text(path: Path) -> str:
    """The text of an HTML file, gzipped or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    parser = PageText()
    html = data.decode("utf-8", "replace").replace("\ufffd", "")
    parser.feed(html)
    parser.close()
    return with_title(parser.text(), re.search(r"<title>\s*(.*?)\s*</title>", html, re.IGNORECASE | re.DOTALL))


def with_title(text: str, title: re.Match[str] | None) -> str:
    """The page's title first, where the text does not begin with it."""
    words = "" if title is None else re.sub(r"\s+", " ", unescape(title[1])).strip()
    return text if not words or text.startswith(words) else f"{words}\n\n{text}"


def without_noise(text: str, seen: set[str]) -> str:
    """Without names of diagrams, dates of change, and long paragraphs that `seen` has; adds the others to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        if re.fullmatch(r"[a-z-]+:|This page last modified on .*|\s*", paragraph):
            continue
        if len(paragraph) >= REPEATED_CHARACTERS:
            if paragraph in seen:
                continue
            seen.add(paragraph)
        kept.append(paragraph)
    return "\n\n".join(kept)


def main() -> None:
    """Write one text file for each page that holds prose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("unpacked", type=Path, help="folder that the packages were unpacked into")
    parser.add_argument("corpus", type=Path, help="folder for the text files")
    parser.add_argument("--documents", type=Path, default=Path("documents.tsv"), help="list of what was written")
    options = parser.parse_args()
    seen: set[str] = set()
    listed = ["document\tlicence\tbytes"]
    for name, (folder, licence) in SOURCES.items():
        root, num_pages, num_bytes = options.unpacked / folder, 0, 0
        pages = sorted(path for path in root.rglob("*") if re.search(r"\.html(\.gz)?$", path.name))
        (options.corpus / name).mkdir(parents=True, exist_ok=True)
        for path in pages:
            if SKIPPED_PAGES.fullmatch(path.name.removesuffix(".gz")):
                continue
            text = without_noise(page_text(path), seen)
            if len(text) < LEAST_CHARACTERS:
                continue
            target = "-".join(path.relative_to(root).parts).removesuffix(".gz").removesuffix(".html") + ".txt"
            (options.corpus / name / target).write_text(text + "\n", encoding="utf-8")
            size = len(text.encode()) + 1
            listed.append(f"{name}/{target}\t{licence}\t{size}")
            num_pages, num_bytes = num_pages + 1, num_bytes + size
        print(f"{name}: {num_pages} pages, {num_bytes / 1e6:.2f} MB")  # noqa: T201
    options.documents.write_text("\n".join(listed) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
