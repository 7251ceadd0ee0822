"""The locks are complete on every supported platform, hashed, and free of torch and of addresses."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PINNED = re.compile(r"^([a-z0-9.-]+)==([^\s;\\]+)")
# Locks are made on one Python and one machine; their entries must do for all of these.
PLATFORMS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for python in ("3.11", "3.12")
    for machine in ("x86_64", "aarch64")
]
EXTRAS = {"base": (), "torch": ("torch",), "dev": ("torch", "dev")}


def pins(lock: Path) -> dict[str, str]:
    """Package to pinned version."""
    matches = (PINNED.match(line) for line in lock.read_text(encoding="utf-8").splitlines())
    return {match[1]: match[2] for match in matches if match}


def asked_for(extras: tuple[str, ...]) -> list[Requirement]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_entry_is_hashed_and_names_no_address(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=[a-z])", text) if PINNED.match(entry)]
    assert len(entries) == len(pins(lock)) > 0
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
    assert "--index-url" not in text and "--find-links" not in text


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_nothing_locked_is_of_one_device(lock: Path) -> None:
    of_a_device = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")
    assert [name for name in pins(lock) if of_a_device.match(name)] == []


@pytest.mark.parametrize("name", sorted(EXTRAS))
@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: f"{p['python_version']}-{p['platform_machine']}")
def test_lock_holds_all_that_is_needed(name: str, platform: dict[str, str]) -> None:
    locked = pins(ROOT / "requirements" / f"{name}.txt")
    missing = []
    todo, seen = asked_for(EXTRAS[name]), set[str]()
    while todo:
        wanted = todo.pop()
        package = canonicalize_name(wanted.name)
        if wanted.marker is not None and not wanted.marker.evaluate({**platform, "extra": ""}):
            continue
        if package not in locked:
            missing += [] if package == "torch" else [str(wanted)]
        else:
            assert SpecifierSet(str(wanted.specifier)).contains(locked[package], prereleases=True), str(wanted)
        if package not in seen and package != "torch":
            seen.add(package)
            todo += requires(package, tuple(wanted.extras), platform)
    assert missing == []


def requires(package: str, extras: tuple[str, ...], platform: dict[str, str]) -> list[Requirement]:
    """What an installed package asks for on `platform`; the tests' environment holds all of dev.txt."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # pinned for another platform
    requirements = [Requirement(line) for line in lines]
    return [r for r in requirements if r.marker is None or applies(r, extras, platform)]


def applies(requirement: Requirement, extras: tuple[str, ...], platform: dict[str, str]) -> bool:
    """Whether the marker holds for one of the extras that were asked for, or for none."""
    assert requirement.marker is not None
    held = any(requirement.marker.evaluate({**platform, "extra": extra}) for extra in ("", *extras))
    if held:
        requirement.marker = None
    return held


def test_one_release_of_each_package_in_all_locks() -> None:
    releases: dict[str, set[str]] = {}
    for lock in LOCKS:
        for package, version in pins(lock).items():
            releases.setdefault(package, set()).add(version)
    assert {package: found for package, found in releases.items() if len(found) > 1} == {}
