"""The two questions asked of a hub over HTTPS: what a revision holds, and one file of it.

Plain httpx. Bounded patience: a refusal for too many requests or a broken connection is tried again a few
times, everything else is told at once, as a `ConfigurationError` that says what to do. A download resumes
where its partial file ends and is checked against the hub's sha256 before it gets its name.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from app.core.errors import ConfigurationError

if TYPE_CHECKING:
    import httpx

DEFAULT_ENDPOINT = "https://huggingface.co"
_ATTEMPTS = 5
_LONGEST_WAIT_SECONDS = 60.0
_CONNECT_SECONDS, _READ_SECONDS = 15.0, 60.0
_TRANSIENT = frozenset({408, 500, 502, 503, 504})

T = TypeVar("T")
Progress = Callable[[int], None]
"""Told the bytes that arrived; negative when what had arrived is discarded."""


class HubSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says about the hub, in the variables that huggingface_hub reads."""

    endpoint: str
    token: str | None
    is_offline: bool
    cache: Path
    """huggingface_hub's cache of repositories."""

    @classmethod
    def from_environment(cls) -> "HubSettings":
        """HF_ENDPOINT, HF_TOKEN (or its file), HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE."""
        shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = Path(os.path.expanduser(os.environ.get("HF_HOME") or f"{shared}/huggingface"))
        token_file = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or home / "token"))
        return cls(
            endpoint=(os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/"),
            token=(os.environ.get("HF_TOKEN") or _first_line(token_file) or "").strip() or None,
            is_offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
            cache=Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or home / "hub")),
        )


class RemoteFile(msgspec.Struct, frozen=True):
    """One file of a revision."""

    path: str
    size: int
    sha256: str | None
    """Known for files in large-file storage, as weights are."""
    blob_id: str | None = None
    """git's own name (sha1) for the content of the other files."""


class RemoteRevision(msgspec.Struct, frozen=True):
    """What a repository holds at one commit."""

    commit: str
    licence: str | None
    files: tuple[RemoteFile, ...]


class _Lfs(msgspec.Struct):
    sha256: str | None = None


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blobId: str | None = None
    lfs: _Lfs | None = None


class _CardData(msgspec.Struct):
    license: str | list[str] | None = None


class _ModelInfo(msgspec.Struct):
    sha: str
    siblings: list[_Sibling]
    cardData: _CardData | None = None


class Hub:
    """A connection to one hub. Use as a context manager."""

    def __init__(self, settings: HubSettings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        import httpx

        self._settings = settings
        self._sleep = sleep
        self._client = httpx.Client(
            follow_redirects=True,  # httpx drops the token when a redirect leaves the host
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
            headers={"authorization": f"Bearer {settings.token}"} if settings.token else {},
        )

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def revision(self, repository: str, revision: str) -> RemoteRevision:
        """List a revision.

        Raises:
            ConfigurationError: no such repository or revision, no permission, or the hub cannot be reached.
        """
        url = f"{self._settings.endpoint}/api/models/{repository}/revision/{revision.replace('/', '%2F')}?blobs=true"
        content = self._retry(lambda: self._read_all(url, repository), what=repository)
        try:
            info = msgspec.json.decode(content, type=_ModelInfo)
        except msgspec.DecodeError as error:
            raise ConfigurationError(
                f"{self._settings.endpoint} did not answer as a hub does ({error}); check HF_ENDPOINT"
            ) from error
        licence = info.cardData.license if info.cardData else None
        return RemoteRevision(
            commit=info.sha,
            licence=", ".join(licence) if isinstance(licence, list) else licence,
            files=tuple(
                RemoteFile(
                    sibling.rfilename,
                    0 if sibling.size is None else sibling.size,
                    sibling.lfs.sha256 if sibling.lfs else None,
                    None if sibling.lfs else sibling.blobId,
                )
                for sibling in info.siblings
            ),
        )

    def download(self, repository: str, commit: str, file: RemoteFile, target: Path, *, progress: Progress) -> str:
        """Fetch one file to `target`, going on where `target`.part ends, and return its sha256.

        Raises:
            ConfigurationError: as `revision`; or the content is not what the hub announced (nothing is kept).
        """
        url = f"{self._settings.endpoint}/{repository}/resolve/{commit}/{file.path}"
        part = target.with_name(target.name + ".part")
        if part.exists():
            progress(part.stat().st_size)
        self._retry(lambda: self._fetch(url, repository, file, part, progress=progress), what=file.path)
        with part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if not _is_as_announced(part, digest, file):
            part.unlink()
            raise ConfigurationError(
                f"{file.path} of {repository} arrived damaged (sha256 {digest}, not what the hub announced); it was "
                "deleted. Try again; if it happens twice, something between here and the hub changes files"
            )
        part.rename(target)
        return digest

    def _read_all(self, url: str, repository: str) -> bytes:
        with self._get(url, repository, headers={}) as response:
            return response.read()

    def _fetch(self, url: str, repository: str, file: RemoteFile, part: Path, *, progress: Progress) -> None:
        have = part.stat().st_size if part.exists() else 0
        if have == file.size and have > 0:
            return
        # Compressed in transit, a range would count other bytes than those that are kept.
        headers = {"accept-encoding": "identity"} | ({"range": f"bytes={have}-"} if 0 < have < file.size else {})
        with self._get(url, repository, headers=headers) as response:
            resumes = response.status_code == 206
            if have and not resumes:
                progress(-have)
            num_bytes = have if resumes else 0
            with part.open("ab" if resumes else "wb") as output:
                for chunk in response.iter_bytes():  # as it arrives: a larger unit would be lost when it breaks off
                    num_bytes += len(chunk)
                    if num_bytes > file.size:  # the check that follows refuses it; do not fill the disk first
                        return
                    output.write(chunk)
                    progress(len(chunk))
        if num_bytes < file.size:
            raise _TryAgain(f"{file.path} broke off after {num_bytes} of {file.size} bytes")

    @contextmanager
    def _get(self, url: str, repository: str, *, headers: dict[str, str]) -> Iterator["httpx.Response"]:
        """One answered request. Status codes become what they mean."""
        import httpx

        try:
            with self._client.stream("GET", url, headers=headers) as response:
                self._check_status(response, repository)
                yield response
        except httpx.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error
        except httpx.HTTPError as error:
            raise ConfigurationError(f"the hub could not be asked for {repository}: {error}") from error

    def _check_status(self, response: "httpx.Response", repository: str) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status == 429 or status in _TRANSIENT:
            raise _TryAgain(f"the hub answered {status}", wait_seconds=_retry_after(response))
        if status in (401, 403):
            what = "the token in HF_TOKEN has no access to it" if self._settings.token else "no HF_TOKEN is set"
            raise ConfigurationError(
                f"the hub refuses {repository} ({status}): {what}. Check the name; for a gated or private model accept "
                f"its terms at {self._settings.endpoint}/{repository} and set HF_TOKEN to a token that may read it"
            )
        if status == 404:
            raise ConfigurationError(
                f"{self._settings.endpoint} has no {repository} with that revision or file (404); check the name"
            )
        raise ConfigurationError(f"the hub answered {status} for {repository}; try again later")

    def _retry(self, call: Callable[[], T], *, what: str) -> T:
        """Call again after passing troubles, waiting as long as the hub asks for within bounds."""
        wait_seconds = 1.0
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return call()
            except _TryAgain as trouble:
                if attempt == _ATTEMPTS or (trouble.wait_seconds or 0.0) > _LONGEST_WAIT_SECONDS:
                    raise ConfigurationError(
                        f"{what} could not be fetched from {self._settings.endpoint}: {trouble}. What arrived is kept; "
                        "try again later, or serve a folder or .gguf file that you have"
                    ) from trouble
                self._sleep(wait_seconds if trouble.wait_seconds is None else trouble.wait_seconds)
                wait_seconds *= 2
        raise AssertionError("unreachable")


class _TryAgain(Exception):
    """A trouble that may pass."""

    def __init__(self, reason: str, *, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


def _is_as_announced(path: Path, digest: str, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return digest == file.sha256
    if file.blob_id is not None:
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return blob.hexdigest() == file.blob_id
    return True


def _retry_after(response: "httpx.Response") -> float | None:
    """Seconds of Retry-After; its other form, a date, is treated as absent."""
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if seconds >= 0 else None


def _first_line(path: Path) -> str | None:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return lines[0] if lines else None
