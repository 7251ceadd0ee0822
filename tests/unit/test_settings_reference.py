"""The reference pages of flags and exit codes are what the code says."""

import os
import subprocess
import sys
from pathlib import Path

from app.cli import EXIT_CONFIGURATION, EXIT_INTERRUPTED, EXIT_OK
from app.settings import OTHER_VARIABLES, Settings
from scripts.describe_settings import EXIT_CODE_MEANINGS, exit_codes_page, flags_page

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def test_the_pages_are_current() -> None:
    for name, page in (("flags", flags_page()), ("exit-codes", exit_codes_page())):
        again = f"PYTHONPATH=. python scripts/describe_settings.py {name} > docs/reference/{name}.md"
        assert (REFERENCE / f"{name}.md").read_text(encoding="utf-8") == page, again


def test_every_setting_and_variable_has_a_row() -> None:
    rows = [line.split(" | ") for line in flags_page().splitlines() if line.startswith("| `")]
    variables = {row[1].strip("`") for row in rows if row[1].startswith("`HEADWATER_")}
    assert variables == {f"HEADWATER_{name.upper()}" for name in Settings.model_fields}
    assert {row[0].strip("| `") for row in rows} >= OTHER_VARIABLES
    assert all(row[-1].rstrip(" |").endswith(".") for row in rows)


def test_the_other_commands_are_there() -> None:
    page = flags_page()
    assert all(f"### headwater {name}\n" in page for name in ("pull", "list", "chat", "complete", "demo"))
    assert "### headwater serve" not in page


def test_commands_end_with_the_codes_of_the_page() -> None:
    def code(*arguments: str) -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode

    assert code("--version") == EXIT_OK
    assert code("check", "--port", "high") == EXIT_CONFIGURATION
    assert code("check", "--no-such-flag") == EXIT_CONFIGURATION  # argparse's own is the same
    assert {EXIT_OK, EXIT_CONFIGURATION, EXIT_INTERRUPTED} <= set(EXIT_CODE_MEANINGS)
