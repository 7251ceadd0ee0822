"""docs/how-to/move-from-another-server.md: what its tables say of flags, variables, endpoints and fields is so."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from app.cli import make_parser
from app.core.errors import ConfigurationError
from app.settings import ENV_PREFIX, OTHER_VARIABLES, Settings
from tests.contract.serving import FakeServer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "move-from-another-server.md").read_text(encoding="utf-8")
PATHS = frozenset(json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"])
VARIABLES = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
VALUES = {
    "stop": "x",
    "structured_outputs": {"json_object": True},
    "response_format": {"type": "text"},
    "request_id": "id",
    "cache_salt": "x",
    "bad_words": ["x"],
    "logit_bias": {"5": 1},
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"), True),
    **dict.fromkeys(("add_special_tokens", "return_token_ids", "return_tokens_as_token_ids"), True),
    **{name: [5] for name in ("stop_token_ids", "allowed_token_ids")},
}
"""Of fields that take no 1."""


class Row(NamedTuple):
    """One row of a table."""

    kind: str
    """flag, variable, endpoint, field or option: the last word of the table's head."""
    theirs: list[str]
    here: str

    @property
    def ours(self) -> list[str]:
        """What the column *here* names."""
        return re.findall(r"`([^`]+)`", self.here)


def rows() -> Iterator[Row]:
    kind = ""
    for line in PAGE.splitlines():
        if not line.startswith("| ") or line.startswith("|---"):
            continue
        theirs, here = (cell.strip() for cell in line.strip("| ").split(" | "))
        if here == "here":
            kind = theirs.rpartition(" ")[2]
        else:
            yield Row(kind, re.findall(r"`([^`]+)`", theirs), here)


ROWS = [pytest.param(row, id=" ".join(row.theirs)) for row in rows()]
FLAGS = {
    flag
    for action in make_parser()._subparsers._group_actions[0].choices["serve"]._actions  # type: ignore[union-attr,index]
    for flag in action.option_strings
}


def of(*kinds: str) -> list[object]:
    return [param for param in ROWS if param.values[0].kind in kinds]  # type: ignore[union-attr]


def test_the_page_has_tables_of_each_kind() -> None:
    assert len(ROWS) >= 80
    assert {param.values[0].kind for param in ROWS} == {"flag", "variable", "endpoint", "field", "option"}  # type: ignore[union-attr]


@pytest.mark.parametrize("row", ROWS)
def test_what_is_named_here_exists(row: Row) -> None:
    for name in row.ours:
        if name.startswith("--"):
            assert name.split()[0] in FLAGS
        elif name.startswith("/"):
            assert name in PATHS
        elif name.startswith(ENV_PREFIX):
            assert name in VARIABLES
    assert row.ours or row.here.startswith(("the same", "none", "MODEL", "a 400"))


@pytest.mark.parametrize("row", of("flag"))
def test_flags(row: Row) -> None:
    for flag in row.theirs:
        if row.here.startswith("the same"):
            assert flag in FLAGS
        else:
            # `--api-key` is known, to say which flag to take.
            with pytest.raises((SystemExit, ConfigurationError)):
                make_parser().parse_args(["serve", flag.split()[0], "x"])


@pytest.mark.parametrize("row", of("endpoint"))
def test_endpoints(server: FakeServer, row: Row) -> None:
    for path in row.theirs:
        if row.here.startswith(("the same", "a 400")):
            assert path in PATHS
        else:
            assert server.http.post(path, json={}).status_code == server.http.get(path).status_code == 404


@pytest.mark.parametrize("row", of("field", "option"))
def test_fields(server: FakeServer, row: Row) -> None:
    for field in row.theirs:
        response = server.post({"prompt": "a", "max_tokens": 1, field: VALUES.get(field, 1)})
        if row.here.startswith("the same"):
            assert response.status_code == 200, response.text
            assert field not in response.headers.get("headwater-ignored", "")
            continue
        assert response.status_code == 400 and response.json()["error"]["param"] == field
        message = response.json()["error"]["message"]
        assert row.here.startswith("none") or any(f"`{name}`" in message for name in row.ours), message
