"""One server of the comparison while it is measured: how it is started, and how requests are put in its words."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec

from loadtest.compare.peers import Peer, Places
from loadtest.compare.server import Server, free_port
from loadtest.run import RunConfig


@contextmanager
def session(peer: Peer, places: Places) -> Iterator[tuple[Server, float]]:
    """The server, and the seconds from its start to its first answer. Raises ServerFailed where it does not answer."""
    port = free_port()
    command, environment = places.command(peer, port=port), places.environment(peer)
    log = places.peers / "logs" / f"{peer.name}.log"
    with Server(command, environment=environment, port=port, log=log) as server:
        yield server, server.wait_ready(request_fields(peer, places), timeout_s=peer.ready_timeout_s)


def with_peer(config: RunConfig, peer: Peer, places: Places) -> RunConfig:
    """The same run in the words that this server takes."""
    fields = dict(request_fields(peer, places))
    model = fields.pop("model", None)
    return msgspec.structs.replace(
        config,
        model=None if model is None else str(model),
        ignore_eos=peer.ignores_eos,
        keep_alive=peer.keeps_connections,
        extra_body=fields,
    )


def request_fields(peer: Peer, places: Places) -> Mapping[str, object]:
    """The fields that every request to this server carries."""
    model = {} if peer.model is None else {"model": places.fill(peer.model)}
    return model | dict(peer.extra_body)
