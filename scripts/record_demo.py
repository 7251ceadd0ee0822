"""Record `headwater demo` and make docs/images/demo.svg of what it printed.

    python scripts/record_demo.py [--url URL]

The picture is the demo's own output, drawn by rich; it loads nothing from anywhere.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.terminal_theme import MONOKAI

from app.terminal.demo import DemoOptions, run_demo

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.svg"
TITLE = "headwater demo"
WIDTH = 82
_WEB_FONT = re.compile(r"@font-face\s*\{.*?\}\s*", re.DOTALL)


def main() -> int:
    """Run the demo; write the picture where all went well. The demo's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a server that runs; default: start one")
    options = parser.parse_args()
    console = recorder(sys.stdout)
    result = run_demo(DemoOptions(url=options.url), console=console, progress=Console(stderr=True))
    if result.verdict.exit_code == 0:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_text(to_svg(console), encoding="utf-8")
        print(f"wrote {PICTURE.relative_to(PICTURE.parents[2])}")
    return result.verdict.exit_code


def recorder(file: IO[str]) -> Console:
    """A console that remembers what it prints, in colour whatever the file is."""
    return Console(file=file, record=True, width=WIDTH, force_terminal=True, color_system="truecolor", highlight=False)


def to_svg(console: Console) -> str:
    """The picture of all that was printed. Equal output makes an equal picture."""
    picture = console.export_svg(title=TITLE, theme=MONOKAI, clear=False, unique_id="demo")
    # A viewer need not ask another host for a font: any monospaced one will do.
    return _WEB_FONT.sub("", picture).replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


if __name__ == "__main__":
    sys.exit(main())
