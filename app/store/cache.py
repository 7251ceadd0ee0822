"""The user's cache of canonical folders: where they lie, how they come into being, whether they are whole.

A folder appears by one rename, complete with its manifest, so a reader never sees half of one. Makers of
the same folder wait for each other on a file lock. A folder whose files no longer match the manifest is
made again. Layout below the cache's root: `models/<key>`, `locks/<key>`, `staging/<key>` (being made,
owned by whoever holds the lock), `downloads/<key>` (partial files, kept for resumption).
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError

MANIFEST = "headwater.json"
Report = Callable[[str], None]


class ManifestFile(msgspec.Struct, frozen=True):
    """One file of a folder as it was written."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`headwater.json`: what the folder is and what its files must be."""

    name: str
    source: str
    revision: str | None
    licence: str | None
    source_bytes: int | None = None
    source_sha256: str | None = None
    converter_epoch: int | None = None
    files: tuple[ManifestFile, ...] = ()


def cache_root(cache_dir: Path | None = None) -> Path:
    """`cache_dir`, else HEADWATER_CACHE, else `headwater` in the user's cache folder (XDG_CACHE_HOME).

    Raises:
        ConfigurationError: none of them is known: a user without a home folder, as in a container.
    """
    if cache_dir is not None:
        return cache_dir
    own = os.environ.get("HEADWATER_CACHE")
    if own:
        return Path(os.path.expanduser(own))
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared and os.path.isabs(shared):
        return Path(shared) / "headwater"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise ConfigurationError("this user has no home folder to keep models in; name a folder in HEADWATER_CACHE")
    return Path(home) / ".cache" / "headwater"


def model_path(root: Path, key: str) -> Path:
    """Where the folder of this key lies when it is there."""
    return root / "models" / key


def whole_folder(path: Path) -> Manifest | None:
    """The manifest of a folder whose files are as they were written; None where it must be made (again).

    Sizes and times are compared; a file with another time (a copied cache) is hashed.
    """
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
        whole = bool(manifest.files) and all(_is_unchanged(path / file.path, file) for file in manifest.files)
    except (OSError, msgspec.DecodeError):
        return None
    return manifest if whole else None


def ensure_folder(
    root: Path,
    key: str,
    *,
    report: Report,
    make: Callable[[Path, Path], tuple[Manifest, Mapping[str, str]]],
) -> tuple[Path, Manifest]:
    """The folder of `key`, made if it is not there.

    Args:
        make: fills the empty staging folder (first argument; the second keeps partial downloads) and
            returns the manifest without files, and the sha256 of files that it hashed already.

    Raises:
        ConfigurationError: the cache cannot be written; or whatever `make` raises.
    """
    path = model_path(root, key)
    manifest = whole_folder(path)
    if manifest is not None:  # no lock: works on a read-only cache
        return path, manifest
    try:
        with _locked(root / "locks" / key, report=report):
            manifest = whole_folder(path)
            if manifest is None:
                manifest = _make(root, key, make)
            return path, manifest
    except OSError as error:
        raise ConfigurationError(
            f"the model cache {root} cannot be written: {error}; free space there or name another folder in "
            "HEADWATER_CACHE"
        ) from error


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(root: Path, key: str, make: Callable[[Path, Path], tuple[Manifest, Mapping[str, str]]]) -> Manifest:
    staging, downloads, path = root / "staging" / key, root / "downloads" / key, model_path(root, key)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        draft, digests = make(staging, downloads)
        manifest = msgspec.structs.replace(draft, files=_describe_files(staging, digests))
        _write_synced(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        if path.exists():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)  # only now: a failed make resumes from them
    return manifest


def _describe_files(folder: Path, digests: Mapping[str, str]) -> tuple[ManifestFile, ...]:
    described = []
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # after a power cut the manifest must not vouch for an empty file
        status = file.stat()
        digest = digests.get(file.name) or file_sha256(file)
        described.append(ManifestFile(file.name, status.st_size, status.st_mtime_ns, digest))
    return tuple(described)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_unchanged(path: Path, expected: ManifestFile) -> bool:
    status = path.stat()
    if status.st_size != expected.bytes:
        return False
    return status.st_mtime_ns == expected.mtime_ns or file_sha256(path) == expected.sha256


@contextmanager
def _locked(path: Path, *, report: Report) -> Iterator[None]:
    """Hold an exclusive lock. The kernel gives it back when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is fetching this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
