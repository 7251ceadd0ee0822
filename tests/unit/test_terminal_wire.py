"""What the commands in the terminal read from a server, and what they say when it fails."""

import httpx
import pytest

from app.core.errors import ConfigurationError
from app.terminal.show import printable
from app.terminal.wire import Api, ApiError, Delta, Lines, Unreachable, base_url, read_line, response_error
from tests.terminal_server import other_server


def test_events() -> None:
    assert read_line('data: {"choices":[{"text":"a","finish_reason":null}]}') == Delta("a", None)
    assert read_line('data:{"choices":[{"delta":{"content":"b"},"finish_reason":"stop"}]}') == Delta("b", "stop")
    thought = read_line('data: {"choices":[{"delta":{"reasoning_content":"c"}}]}')
    assert thought == Delta("", None, reasoning="c")
    assert read_line('data: {"choices":[{"delta":{"role":"assistant"}}]}') == Delta("", None)
    for line in ("", ": keep-alive", "event: x", "data: [DONE]", 'data: {"choices":[],"usage":{}}'):
        assert read_line(line) is None
    with pytest.raises(ApiError, match=r"^the server ended the answer: the engine is gone$"):
        read_line('data: {"error": {"message": "the engine is gone", "code": null}}')
    with pytest.raises(ApiError, match="not of this API: 'nonsense'"):
        read_line("data: nonsense")


def test_lines_end_at_newlines_alone() -> None:
    text = 'data: "a\u2028b\x85c\u0085"\r\ndata: 你好\n'
    lines = Lines()
    found = [line for byte in text.encode() for line in lines.push(bytes([byte]))]
    assert found == ['data: "a\u2028b\x85c\u0085"', "data: 你好"]


@pytest.mark.parametrize("url", ["http://h:1/v1", "http://h:1/", " http://h:1", "http://h:1/v1/"])
def test_addresses(url: str) -> None:
    assert base_url(url) == "http://h:1"


@pytest.mark.parametrize("url", ["", "h:1", "ftp://h", "http://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match="--url takes an address"):
        base_url(url)


@pytest.mark.parametrize(
    ("body", "end"),
    [
        (b'{"error": {"message": "no", "code": "c"}}', ": no"),
        (b'{"error": "no"}', ": no"),
        (b"<html>", ""),
        (b'{"detail": "Not Found"}', ""),
    ],
)
def test_errors_of_responses(body: bytes, end: str) -> None:
    response = httpx.Response(418, content=body, request=httpx.Request("GET", "http://h/x"))
    assert str(response_error(response)) == f"http://h/x answered 418{end}"


def test_models_and_readiness_of_another_server() -> None:
    with other_server(lambda path, body: [], model={"id": "m", "owned_by": "x"}) as server, Api(server.url) as api:
        assert api.choose_model(None).id == api.choose_model("m").id == "m"
        assert api.choose_model("m").row_independent is None
        assert api.ready() is None
        with pytest.raises(ApiError, match="does not serve 'n'; it serves: m"):
            api.choose_model("n")
        url = server.url
    with Api(url) as api, pytest.raises(Unreachable, match="headwater serve"):
        api.ready()


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\tb\n你好 👩‍👩‍👧 é") == "a\tb\n你好 👩‍👩‍👧 é"
    assert printable("\x1b[2J\x07\r\x9b1m\x7f") == "\\x1b[2J\\x07\\x0d\\x9b1m\\x7f"
