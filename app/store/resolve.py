"""From what the operator wrote to one canonical folder. The entry to `app.store`.

`resolve` takes, in this order: a name of the catalogue, a folder, a .gguf file, a repository of the hub
(`owner/name`, `owner/name@revision`). What is in the cache is used without asking anyone.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError
from app.store.cache import Manifest, Report, cache_root, ensure_folder, file_sha256, model_path, whole_folder
from app.store.catalog import CatalogEntry, HubSource, PipSource, catalog_path, catalogue
from app.store.folder import GGUF_WEIGHTS, ModelFolder, describe_folder, is_in_blocks, weight_files

_REPOSITORY = re.compile(r"(?P<repository>[\w][\w.-]{0,95}/[\w][\w.-]{0,95})(@(?P<revision>[\w][\w./-]{0,127}))?")


_AS_IT_IS = "int4"
"""What --quantization calls the weights of a .gguf as they are."""
_MOST_GROWTH = 8
"""A .gguf in bfloat16 takes at most this many times its size (2 bits a weight)."""


class GgufForm(msgspec.Struct, frozen=True):
    """How a .gguf file is served: in bfloat16, or as it is."""

    as_it_is: bool = False
    memory_bytes: int | None = None
    """Where its weights in bfloat16 would take more, it is served as it is. None: that is not asked."""


class ModelListing(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `headwater list`."""

    name: str
    description: str
    licence: str
    context_length: int
    source: str
    is_default: bool
    is_cached: bool
    path: Path | None
    num_bytes: int | None
    """Of everything in the cached folder; None where it is not cached."""
    download_bytes: int | None
    """What a first start fetches, where it is known."""


def resolve(
    model: str,
    *,
    cache_dir: Path | None = None,
    is_offline: bool = False,
    gguf_form: GgufForm | None = None,
    report: Report,
) -> ModelFolder:
    """Find or make the canonical folder of `model`.

    Args:
        model: a catalogue name, a folder, a .gguf file or a hub repository.
        cache_dir: the cache's root; None: HEADWATER_CACHE, else the user's cache folder.
        is_offline: take what is on this machine, and refuse what would have to be fetched.
        gguf_form: in which form the weights of a .gguf are wanted; None: in bfloat16.
        report: told in one line each what takes time, and the licence of what is fetched.

    Raises:
        ConfigurationError: it cannot be found, fetched or converted; says what to do.
    """
    root = cache_root(cache_dir)
    gguf_form = GgufForm() if gguf_form is None else gguf_form
    entries = catalogue()
    if model in entries:
        as_it_is = gguf_form.as_it_is
        folder = _resolve_entry(model, entries[model], root, is_offline=is_offline, as_it_is=as_it_is, report=report)
        return msgspec.structs.replace(
            folder, generation_defaults=folder.generation_defaults.or_else(entries[model].sampling)
        )
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return _resolve_directory(path.resolve(), root, gguf_form=gguf_form, report=report)
    if path.is_file():
        return _resolve_file(path.resolve(), root, gguf_form=gguf_form, report=report)
    repository = _REPOSITORY.fullmatch(model)
    if repository and not model.endswith(".gguf"):
        source = HubSource(repository["repository"], repository["revision"] or "main")
        return _resolve_repository(source, root, name=model, licence=None, is_offline=is_offline, report=report)
    raise ConfigurationError(
        f"{model!r} is no folder, .gguf file or hub repository (owner/name), and not in the catalogue, "
        f"which has: {', '.join(entries)}"
    )


def pull(model: str, *, cache_dir: Path | None = None, report: Report) -> ModelFolder:
    """Fetch a catalogue name or hub repository into the cache, so that serving it needs no network.

    What is in the cache stays as it is: a branch that moved on is fetched by its new revision (`owner/name@revision`).

    Raises:
        ConfigurationError: as `resolve`; also for a folder or file, which needs no fetching.
    """
    entry = catalogue().get(model)
    if entry is not None and entry.pip is not None:  # what was cached before may lack the file as it is
        resolve(model, cache_dir=cache_dir, gguf_form=GgufForm(as_it_is=True), report=report)
    if entry is None and os.path.exists(os.path.expanduser(model)):
        raise ConfigurationError(f"{model} is on this machine already; serve it as it is")
    return resolve(model, cache_dir=cache_dir, report=report)


def list_models(*, cache_dir: Path | None = None) -> list[ModelListing]:
    """The catalogue, and what of it is in the cache."""
    root = cache_root(cache_dir)
    return [_listing(name, entry, root) for name, entry in catalogue().items()]


def _listing(name: str, entry: CatalogEntry, root: Path) -> ModelListing:
    if entry.folder is None:
        path = model_path(root, _entry_key(name, entry))
        if entry.pip is not None and not path.is_dir():
            path = model_path(root, _entry_key(name, entry, as_it_is=True))
        manifest = whole_folder(path)
        num_bytes = None if manifest is None else sum(file.bytes for file in manifest.files)
    else:
        path = catalog_path().parent / entry.folder
        num_bytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return ModelListing(
        name=name,
        description=entry.description,
        licence=entry.licence,
        context_length=entry.context_length,
        source=_entry_source(entry),
        is_default=entry.default,
        is_cached=num_bytes is not None,
        path=None if num_bytes is None else path,
        num_bytes=num_bytes,
        download_bytes=None if entry.pip is None else entry.pip.bytes,
    )


def _resolve_entry(
    name: str, entry: CatalogEntry, root: Path, *, is_offline: bool, as_it_is: bool, report: Report
) -> ModelFolder:
    if entry.folder is not None:
        path = catalog_path().parent / entry.folder
        return describe_folder(path, name=name, source=_entry_source(entry), licence=entry.licence)
    if entry.hub is not None:
        return _resolve_repository(
            entry.hub, root, name=name, licence=entry.licence, is_offline=is_offline, report=report
        )
    if entry.pip is None:  # the catalogue has checked it
        raise ConfigurationError(f"{name} has no source in the catalogue")
    return resolve_wheel(name, entry, entry.pip, root, is_offline=is_offline, as_it_is=as_it_is, report=report)


def resolve_wheel(
    name: str, entry: CatalogEntry, source: PipSource, root: Path, *, is_offline: bool, as_it_is: bool, report: Report
) -> ModelFolder:
    """The folder of the file as it is, which is fetched once, or of what is converted from there."""
    manifest = _converted_manifest(name, _entry_source(entry), entry.licence, source)

    def fetch(staging: Path, downloads: Path) -> tuple[Manifest, Mapping[str, str]]:
        from app.store.pip_source import fetch_member

        if is_offline:
            raise ConfigurationError(
                f"{name} is not in the cache{' as it is' if as_it_is else ''}, and fetching it is forbidden "
                f"(--offline); run `headwater pull {name}` where there is a network"
            )
        member = fetch_member(source, downloads, report=report).rename(staging / GGUF_WEIGHTS)
        report(f"licence of {name}: {entry.licence}")
        return manifest, {GGUF_WEIGHTS: source.member_sha256, **_index(member, staging, report=report)}

    def convert(staging: Path, _downloads: Path) -> tuple[Manifest, Mapping[str, str]]:
        fetched, _ = ensure_folder(root, _entry_key(name, entry, as_it_is=True), report=report, make=fetch)
        return manifest, _convert(fetched / GGUF_WEIGHTS, staging, name=Path(source.member).name, report=report)

    make = fetch if as_it_is else convert
    return _describe(*ensure_folder(root, _entry_key(name, entry, as_it_is=as_it_is), report=report, make=make))


def _resolve_file(path: Path, root: Path, *, gguf_form: GgufForm, report: Report) -> ModelFolder:
    if path.suffix != ".gguf":
        raise ConfigurationError(f"{path} is a file; give a .gguf file or the folder that holds the model")
    status = path.stat()
    # Hashing gigabytes at each start would cost more than converting does: path, size and time stand for it.
    as_it_is = gguf_form.as_it_is or _is_too_large(path, status.st_size, gguf_form.memory_bytes, report=report)
    identity = hashlib.sha256(f"{path}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()

    def make(staging: Path, downloads: Path) -> tuple[Manifest, Mapping[str, str]]:
        from app.store.gguf_convert import CONVERTER_EPOCH

        sha256 = file_sha256(path)
        if as_it_is:
            (staging / GGUF_WEIGHTS).symlink_to(path)
            digests = {GGUF_WEIGHTS: sha256, **_index(path, staging, report=report)}
        else:
            digests = _convert(path, staging, name=path.name, report=report)
        manifest = Manifest(
            name=path.stem,
            source=str(path),
            revision=None,
            licence=None,
            source_bytes=status.st_size,
            source_sha256=sha256,
            converter_epoch=CONVERTER_EPOCH,
        )
        return manifest, digests

    key = f"{_safe(path.stem)}-{identity[:12]}-e{_converter_epoch()}{_suffix(as_it_is)}"
    return _describe(*ensure_folder(root, key, report=report, make=make))


def _is_too_large(path: Path, num_bytes: int, memory_bytes: int | None, *, report: Report) -> bool:
    """Whether the file's weights in bfloat16 would take more than the memory."""
    if memory_bytes is None or num_bytes * _MOST_GROWTH <= memory_bytes:  # most starts need not read it here
        return False
    from app.store.gguf_file import read_gguf

    needed = 2 * sum(math.prod(tensor.shape) for tensor in read_gguf(path).tensors.values())
    if needed <= memory_bytes:
        return False
    report(
        f"{path.name} would take {needed / 2**30:.1f} GiB in bfloat16 and {memory_bytes / 2**30:.1f} GiB of memory are "
        f"free: it is served as it is (--quantization {_AS_IT_IS})"
    )
    return True


def _resolve_directory(path: Path, root: Path, *, gguf_form: GgufForm, report: Report) -> ModelFolder:
    """A folder is used where it is; one that holds a single .gguf and no safetensors stands for that file."""
    ggufs = sorted(path.glob("*.gguf"))
    is_whole = is_in_blocks(path)
    if len(ggufs) == 1 and not is_whole and not list(path.glob("*.safetensors")):
        return _resolve_file(ggufs[0], root, gguf_form=gguf_form, report=report)
    if not (path / "config.json").is_file():
        raise ConfigurationError(f"{path} has no config.json; give the folder that holds the model's files")
    if not is_whole:
        weight_files(path)  # says what is wrong with the weights before anything about the tokenizer
    manifest = whole_folder(path)
    if manifest is not None:
        return _describe(path, manifest)
    return describe_folder(path, name=path.name, source=str(path))


def _resolve_repository(
    source: HubSource, root: Path, *, name: str, licence: str | None, is_offline: bool, report: Report
) -> ModelFolder:
    def make(staging: Path, downloads: Path) -> tuple[Manifest, Mapping[str, str]]:
        from app.store.hub_source import fetch_repository

        fetched = fetch_repository(source, staging, downloads, licence=licence, is_offline=is_offline, report=report)
        describe_folder(staging, name=name, source=source.repository)  # what cannot be served does not enter the cache
        manifest = Manifest(
            name=name, source=f"{source.repository} on the hub", revision=fetched.commit, licence=fetched.licence
        )
        return manifest, fetched.digests

    return _describe(*ensure_folder(root, repository_key(source), report=report, make=make), name=name)


def _convert(source: Path, staging: Path, *, name: str, report: Report) -> dict[str, str]:
    from app.store.gguf_convert import convert_gguf

    report(f"converting {name} to bfloat16 safetensors, once")
    return convert_gguf(source, staging)


def _index(source: Path, staging: Path, *, report: Report) -> dict[str, str]:
    from app.store.gguf_convert import index_gguf

    return index_gguf(source, staging, report=report)


def _converted_manifest(name: str, source: str, licence: str, pip: PipSource) -> Manifest:
    from app.store.gguf_convert import CONVERTER_EPOCH

    return Manifest(
        name=name,
        source=source,
        revision=pip.requirement.partition("==")[2],
        licence=licence,
        source_bytes=pip.member_bytes,
        source_sha256=pip.member_sha256,
        converter_epoch=CONVERTER_EPOCH,
    )


def _entry_key(name: str, entry: CatalogEntry, *, as_it_is: bool = False) -> str:
    if entry.pip is not None:
        return f"{name}-{entry.pip.member_sha256[:12]}-e{_converter_epoch()}{_suffix(as_it_is)}"
    if entry.hub is not None:
        return repository_key(entry.hub)
    raise ConfigurationError(f"{name} has no source in the catalogue")


def _suffix(as_it_is: bool) -> str:
    return "-gguf" if as_it_is else ""


def repository_key(source: HubSource) -> str:
    """The cache key of a revision of a hub repository."""
    return f"{source.repository.replace('/', '--')}@{_safe(source.revision)}"


def _entry_source(entry: CatalogEntry) -> str:
    if entry.folder is not None:
        return "comes with Headwater"
    if entry.pip is not None:
        return f"{entry.pip.requirement} on the package index, {Path(entry.pip.member).name}"
    return f"{entry.hub.repository} on the hub" if entry.hub is not None else "unknown"


def _converter_epoch() -> int:
    from app.store.gguf_convert import CONVERTER_EPOCH

    return CONVERTER_EPOCH


def _describe(path: Path, manifest: Manifest, *, name: str | None = None) -> ModelFolder:
    return describe_folder(
        path,
        name=manifest.name if name is None else name,
        source=manifest.source,
        revision=manifest.revision,
        licence=manifest.licence,
        source_bytes=manifest.source_bytes,
    )


def _safe(text: str) -> str:
    """A file name of our own making from a foreign one."""
    return re.sub(r"[^\w.-]", "_", text).lstrip(".")[:80] or "model"
