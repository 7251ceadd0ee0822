"""A model hub on loopback: the two routes that Headwater asks of one, with the troubles of real ones.

Use as a context manager; `endpoint` goes into HF_ENDPOINT. Every request is recorded.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Seen:
    """One request as it came in."""

    path: str
    range: str | None
    authorization: str | None


@dataclass
class FakeHub:
    """One repository at one commit, and what goes wrong with it."""

    repository: str
    files: dict[str, bytes]
    licence: str | None = "apache-2.0"
    token: str | None = None
    """Asked of every request where it is set."""
    busy: list[str | None] = field(default_factory=list)
    """The next answers are 429 with these Retry-After values, None for none."""
    break_after: dict[str, list[int]] = field(default_factory=dict)
    """By file: the next answers end after so many bytes of the body."""
    announced_sha256: dict[str, str] = field(default_factory=dict)
    """By file: a sha256 that is not that of the content."""
    announced_blob_id: dict[str, str] = field(default_factory=dict)
    ignores_range: bool = False
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.answer(hub)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def requests_for(self, name: str) -> list[Seen]:
        """The requests for one file."""
        return [seen for seen in self.seen if seen.path.endswith(f"/{name}")]

    def description(self) -> bytes:
        """The answer of the model route."""
        siblings = []
        for name, content in self.files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(content)}
            if name.endswith((".safetensors", ".bin")):
                digest = self.announced_sha256.get(name, hashlib.sha256(content).hexdigest())
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            else:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                sibling["blobId"] = self.announced_blob_id.get(name, blob)
            siblings.append(sibling)
        card = {"license": self.licence} if self.licence else {}
        return json.dumps({"id": self.repository, "sha": COMMIT, "siblings": siblings, "cardData": card}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, hub: FakeHub) -> None:
        path = self.path.partition("?")[0]
        authorization = self.headers.get("authorization")
        hub.seen.append(Seen(path, self.headers.get("range"), authorization))
        if hub.busy:
            after = hub.busy.pop(0)
            return self.reply(429, b"", {} if after is None else {"retry-after": after})
        if hub.token is not None and authorization != f"Bearer {hub.token}":
            return self.reply(401, b'{"error":"Invalid credentials"}')
        if path in (f"/api/models/{hub.repository}/revision/{revision}" for revision in ("main", COMMIT)):
            return self.reply(200, hub.description())
        prefix = f"/{hub.repository}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in hub.files:
            return self.reply(404, b'{"error":"Repository not found"}')
        return self.reply_file(hub, name)

    def reply_file(self, hub: FakeHub, name: str) -> None:
        content, asked = hub.files[name], self.headers.get("range")
        status, start = 200, 0
        if asked is not None and not hub.ignores_range:
            status, start = 206, int(asked.removeprefix("bytes=").rstrip("-"))
        body, breaks = content[start:], hub.break_after.get(name)
        if breaks:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: breaks.pop(0)])
            self.close_connection = True
            return
        self.reply(status, body)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
