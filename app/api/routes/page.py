"""`/` and `/page/...`: the page for a browser, static files of the package `app.api.web`.

The files are read once, when the application is made, and only the names found then are served: no path
of a request reaches the file system. Nothing on the page may come from elsewhere, run inline, or turn a
string into markup: the policy below says so to the browser, and the page keeps to it.
"""

import gzip
import hashlib
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from app.api.deps import ServerContext
from app.core.errors import NotFound

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_INDEX = "index.html"
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Always asked for, mostly answered with 304: a new version shows at once.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}


class StaticFile(NamedTuple):
    """One file, ready to be sent."""

    content: bytes
    compressed: bytes
    media_type: str
    etag: str


def routes(context: ServerContext) -> APIRouter:
    """The page's routes; none where the operator switched it off."""
    router = APIRouter(include_in_schema=False)
    if not context.page:
        return router
    files = load_files()

    @router.get("/", response_class=Response)
    async def index(request: Request) -> Response:
        return _answer(request, files[_INDEX])

    @router.get("/page/{name}", response_class=Response)
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound("The page has no such file.")
        return _answer(request, files[name])

    return router


def load_files() -> dict[str, StaticFile]:
    """All files of the page, by name."""
    entries = resources.files("app.api").joinpath("web").iterdir()
    return {entry.name: _load(entry.name, entry.read_bytes()) for entry in entries if _suffix(entry.name) in _TYPES}


def _load(name: str, content: bytes) -> StaticFile:
    digest = hashlib.sha256(content).hexdigest()[:24]
    return StaticFile(content, gzip.compress(content, mtime=0), _TYPES[_suffix(name)], digest)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _answer(request: Request, file: StaticFile) -> Response:
    is_compressed = "gzip" in request.headers.get("accept-encoding", "")
    etag = f'"{file.etag}{"-gzip" if is_compressed else ""}"'
    headers = _HEADERS | {"etag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if is_compressed:
        headers["content-encoding"] = "gzip"
    return Response(file.compressed if is_compressed else file.content, headers=headers, media_type=file.media_type)
