"""What nobody may find out: no text of a request or an answer reaches the log, however the request ends."""

import logging
from typing import Any

import pytest

from tests.contract.serving import fake_server, wait_until

CANARY = "canary-4711"
BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("ok", {"prompt": CANARY, "max_tokens": 3}, ""),
    ("stream", {"prompt": CANARY, "max_tokens": 3, "stream": True}, ""),
    ("refused", {"prompt": CANARY * 1000}, ""),
    ("field", {"prompt": "a", CANARY: 1}, ""),
    ("value", {"prompt": "a", "stop": [CANARY, 5]}, ""),
    ("defect", {"prompt": CANARY, "max_tokens": 3}, "defect"),
    ("failed", {"prompt": CANARY, "max_tokens": 3}, "output"),
]


@pytest.mark.parametrize(("body", "failure"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_no_text_reaches_the_log(caplog: pytest.LogCaptureFixture, body: dict[str, Any], failure: str) -> None:
    caplog.set_level(logging.DEBUG, logger="headwater")
    with fake_server(text=f"it says {CANARY}") as server:
        if failure:
            server.engine.fail_at, server.engine.failure = 2, failure
        server.post(body)
        wait_until(server.is_idle)
        wait_until(lambda: any(record.name == "headwater.request" for record in caplog.records))
    for record in caplog.records:
        text = f"{record.getMessage()} {getattr(record, 'facts', '')} {record.exc_text or ''} {record.exc_info or ''}"
        assert CANARY not in text, text
