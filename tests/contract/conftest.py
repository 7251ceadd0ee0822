"""One fake server for the tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.contract.serving import FakeServer, fake_server, wait_until


@pytest.fixture(scope="session")
def shared_server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def server(shared_server: FakeServer) -> Iterator[FakeServer]:
    """The shared server, checked to be idle afterwards: nothing leaks, whatever the test did."""
    shared_server.engine.requests.clear()
    shared_server.engine.aborted.clear()
    yield shared_server
    wait_until(shared_server.is_idle)
