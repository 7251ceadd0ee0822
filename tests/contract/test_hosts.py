"""A name that somebody points at this machine does not lead a browser's page to a server without keys."""

from collections.abc import Iterator

import pytest

from app.api.hosts import loopback_hosts
from app.api.key_ring import KeyRing
from app.main import allowed_hosts
from tests.contract.serving import FakeServer, fake_server


@pytest.fixture(scope="module")
def guarded() -> Iterator[FakeServer]:
    with fake_server(allowed_hosts=loopback_hosts("127.0.0.1")) as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LocalHost", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_pass(guarded: FakeServer, host: str) -> None:
    assert guarded.post({"prompt": "a", "max_tokens": 1}, host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::1].x", "a:b:1"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/metrics", "/", "/health"])
def test_other_names_are_refused(guarded: FakeServer, host: str, path: str) -> None:
    response = guarded.http.get(path, headers={"host": host})
    assert response.status_code == 403 and "--api-key-file" in response.json()["error"]["message"]
    if path == "/v1/messages":
        assert response.json()["error"]["type"] == "permission_error"
    else:
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_a_refused_body_leaves_the_connection_usable(guarded: FakeServer) -> None:
    for _ in range(2):
        assert guarded.post({"prompt": "x" * 1_000_000}, host="evil.example").status_code == 403
    assert guarded.http.get("/health").status_code == 200


def test_only_a_server_on_loopback_without_keys_asks() -> None:
    assert loopback_hosts("127.0.0.2") == ("127.0.0.1", "[::1]", "localhost", "127.0.0.2")
    assert loopback_hosts("::1") == loopback_hosts("localhost") == ("127.0.0.1", "[::1]", "localhost")
    assert loopback_hosts("0.0.0.0") is loopback_hosts("::") is loopback_hosts("example.org") is None
    keys = KeyRing(keys=["0123456789abcdef"])
    assert allowed_hosts("127.0.0.1", None) == loopback_hosts("127.0.0.1")
    assert allowed_hosts("127.0.0.1", keys) is allowed_hosts("0.0.0.0", None) is allowed_hosts(None, None) is None
