"""A repository of the hub into the files of a canonical folder.

Only what serving reads is fetched: safetensors, JSON, templates. Pickled weights and Python files stay
where they are. What huggingface_hub already has on this machine is used instead of fetching it again.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError
from app.store.cache import Report, file_sha256
from app.store.catalog import HubSource
from app.store.folder import read_json, require_tokenizer, weight_files
from app.store.hub_api import Hub, HubSettings, Progress, RemoteFile, RemoteRevision

_COMMIT = re.compile(r"[0-9a-f]{40}")
_JSON_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "model.safetensors.index.json",
    }
)
_FILE_NAME = re.compile(r"[\w][\w.-]*")
"""Files of the repository's top folder, with names that are safe as file names here."""


class FetchedRevision(msgspec.Struct, frozen=True):
    """What came into the folder."""

    commit: str
    licence: str | None
    digests: dict[str, str]
    """sha256 by file name."""


def fetch_repository(
    source: HubSource,
    staging: Path,
    downloads: Path,
    *,
    licence: str | None,
    is_offline: bool = False,
    report: Report,
) -> FetchedRevision:
    """Fill `staging` with the files of a repository, from huggingface_hub's cache or the hub itself.

    Args:
        licence: known beforehand; else the hub's own word is reported.
        is_offline: the hub may not be asked, whatever HF_HUB_OFFLINE says.

    Raises:
        ConfigurationError: it cannot be had, or is not a model that can be served.
    """
    repository, revision = source.repository, source.revision
    settings = HubSettings.from_environment()
    local = _local_snapshot(settings, repository, revision)
    if local is not None:
        report(f"taking {repository} from huggingface_hub's cache")
        return _take_snapshot(local, staging, pinned=source.sha256, licence=licence)
    if is_offline or settings.is_offline:
        who = "--offline" if is_offline else "HF_HUB_OFFLINE"
        raise ConfigurationError(
            f"{repository} is neither in Headwater's cache nor in huggingface_hub's, and {who} forbids fetching it; "
            "unset it and run `headwater pull`, or serve a folder or .gguf file that you have"
        )
    with Hub(settings) as hub:
        remote = hub.revision(repository, revision)
        if _COMMIT.fullmatch(revision) and remote.commit != revision:
            raise ConfigurationError(
                f"the hub answered with {remote.commit} where {revision} of {repository} was asked"
            )
        files = [
            msgspec.structs.replace(file, sha256=source.sha256.get(file.path, file.sha256))
            for file in _wanted_files(repository, remote)
        ]
        total = sum(file.size for file in files)
        _check_room(staging, total)
        licence = licence or remote.licence
        report(f"licence of {repository}: {licence or 'not stated, see its page on the hub'}")
        report(f"downloading {repository} ({total / 1e6:.0f} MB) from {settings.endpoint}")
        with _progress_bar(total) as progress:
            digests = {
                file.path: _fetch_file(hub, repository, remote.commit, file, downloads, staging, progress=progress)
                for file in files
            }
    return FetchedRevision(remote.commit, licence, digests)


def is_wanted(name: str) -> bool:
    """Whether serving reads a file of this name."""
    if _FILE_NAME.fullmatch(name) is None:
        return False
    return name in _JSON_FILES or name.endswith((".safetensors", ".jinja"))


def _wanted_files(repository: str, remote: RemoteRevision) -> list[RemoteFile]:
    files = [file for file in remote.files if is_wanted(file.path)]
    names = {file.path for file in files}
    if "config.json" not in names:
        raise ConfigurationError(f"{repository} has no config.json; it is not a model that can be served")
    if not any(name.endswith(".safetensors") for name in names):
        raise ConfigurationError(
            f"{repository} has no safetensors weights. Pickled weights can run code and are never loaded; for a "
            ".gguf, download the file and serve it"
        )
    if "tokenizer.json" not in names:
        raise ConfigurationError(
            f"{repository} has no tokenizer.json, the only tokenizer format that is served. Where transformers is "
            "installed, make a folder with one: load model and tokenizer, save_pretrained both, and serve the folder"
        )
    if "model.safetensors" in names and "model.safetensors.index.json" not in names:
        return [file for file in files if not file.path.endswith(".safetensors") or file.path == "model.safetensors"]
    return files


def _fetch_file(
    hub: Hub, repository: str, commit: str, file: RemoteFile, downloads: Path, staging: Path, *, progress: Progress
) -> str:
    kept = downloads / f"{commit}-{file.path}"  # by commit: parts of two revisions must not be joined
    if kept.exists() and kept.stat().st_size == file.size:  # finished by an earlier, broken run
        digest = file_sha256(kept)
        if file.sha256 in (None, digest):
            progress(file.size)
            _link_or_copy(kept, staging / file.path)
            return digest
    kept.unlink(missing_ok=True)
    digest = hub.download(repository, commit, file, kept, progress=progress)
    _link_or_copy(kept, staging / file.path)  # the first name stays for another try until all files are there
    return digest


def _local_snapshot(settings: HubSettings, repository: str, revision: str) -> Path | None:
    """The folder of this revision in huggingface_hub's cache, if it has all that serving needs."""
    folder = settings.cache / f"models--{repository.replace('/', '--')}"
    try:
        commit = revision if _COMMIT.fullmatch(revision) else (folder / "refs" / revision).read_text().strip()
        if _COMMIT.fullmatch(commit) is None:
            return None
        snapshot = folder / "snapshots" / commit
        read_json(snapshot / "config.json")
        require_tokenizer(snapshot)
        weight_files(snapshot)
    except (OSError, ConfigurationError):
        return None
    return snapshot


def _take_snapshot(snapshot: Path, staging: Path, *, pinned: Mapping[str, str], licence: str | None) -> FetchedRevision:
    """Hard links where the file system allows, copies elsewhere: huggingface_hub may clean its cache."""
    digests: dict[str, str] = {}
    for file in sorted(snapshot.iterdir()):
        if not is_wanted(file.name):
            continue
        blob = file.resolve()
        digest = file_sha256(blob)
        named = blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else digest  # large files: by their sha256
        if digest != named or digest != pinned.get(file.name, digest):
            raise ConfigurationError(f"{blob} in huggingface_hub's cache is damaged; delete it and try again")
        _link_or_copy(blob, staging / file.name)
        digests[file.name] = digest
    return FetchedRevision(snapshot.name, licence, digests)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConfigurationError(
            f"{folder} has {free / 1e6:.0f} MB free and the download takes {num_bytes / 1e6:.0f} MB; free space or "
            "name another folder in HEADWATER_CACHE"
        )


@contextmanager
def _progress_bar(total: int) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere: logs keep lines."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("download", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
