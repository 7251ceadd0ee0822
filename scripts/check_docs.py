"""Checks that every relative link in the Markdown pages leads to a file and, where named, to a heading."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")


def main() -> int:
    """Print every broken link. Returns 1 where there is one."""
    pages = markdown_pages()
    problems = [f"{page.relative_to(ROOT)}: {problem}" for page in pages for problem in broken_links(page)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages, {len(problems)} broken links")
    return 1 if problems else 0


def markdown_pages() -> list[Path]:
    """Pages that git tracks or would track, so that build folders do not count."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for line in listing.splitlines() if (path := ROOT / line).is_file()]


def broken_links(page: Path) -> list[str]:
    """What is wrong with the links of one page; addresses with a scheme are not followed."""
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    problems = []
    for match in LINK.finditer(text):
        link = match.group(1) or match.group(2)
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            problems.append(f"{link} leads to no file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            problems.append(f"{link} leads to no heading")
    return problems


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(match.group(1)) for match in HEADING.finditer(text)}


def anchor(heading: str) -> str:
    """Lower case, punctuation dropped, blanks to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    raise SystemExit(main())
