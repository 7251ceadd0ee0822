"""docs/reference/conformance.md names every rule and every recorded client."""

import json
from pathlib import Path

from tests.fuzz.rules import RULES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "conformance.md").read_text(encoding="utf-8")


def test_the_page_has_every_rule() -> None:
    for rule in RULES:
        assert f"| {rule.name} | {rule.status} | {rule.why} |\n" in PAGE


def test_the_page_has_every_recorded_client() -> None:
    for file in (ROOT / "tests" / "contract" / "recorded").glob("*.json"):
        client = json.loads(file.read_text(encoding="utf-8"))
        assert f"| {client['client']} | {client['version']} | {len(client['requests'])} |\n" in PAGE
