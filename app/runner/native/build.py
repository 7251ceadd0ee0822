"""Finds or builds the shared library of a level.

A library is named after the hash of its sources and flags, so a stale one is never loaded. Order: the
package's own lib/ folder (a wheel brings it), the user's cache folder, the compiler. Building writes a
temporary file and renames it, so that processes that build at once cannot harm each other.

`python -m app.runner.native.build` builds every level into lib/, for the wheel.
"""

import hashlib
import logging
import os
import sys
import time
from pathlib import Path

from app.runner.base import TierUnavailable
from app.runner.native.levels import LEVELS, Level

_PACKAGE = Path(__file__).parent
SOURCES = _PACKAGE / "src"
PREBUILT = _PACKAGE / "lib"
COMMON_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",  # a fused multiply-add happens where the source says so: bits depend on it
    "-fno-tree-pre",  # GCC 12 spills the int8 tiles otherwise
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
)
KERNEL_FLAGS_VARIABLE = "HEADWATER_KERNEL_FLAGS"
"""More compiler flags, for `make sanitize` alone: the library gets a name of its own."""
REMEDY = "install gcc 12 or newer (or set CC), or use the wheel, which brings the kernels"

_log = logging.getLogger(__name__)


def find_or_build(level: Level, *, cache: Path | None = None, compiler: str | None = None) -> Path:
    """The library of `level`, built first where there is none.

    `cache` defaults to the user's cache folder, `compiler` to $CC, else cc. Raises TierUnavailable
    where it must be built and cannot.
    """
    name = library_name(level)
    cache = cache_folder() if cache is None else cache
    for folder in (PREBUILT, cache):
        if (folder / name).is_file():
            return folder / name
    begin = time.monotonic()
    try:
        path = build(level, cache, compiler=compiler)
    except OSError as error:
        # Nowhere to keep it: build for this process alone.
        import tempfile

        folder = Path(tempfile.mkdtemp(prefix="headwater-native-"))
        path = build(level, folder, compiler=compiler)
        _log.warning("cannot keep the native kernels in %s (%s): built for this start only", cache, error.strerror)
    _log.warning("built the native kernels for %s in %.1f s: %s", level.name, time.monotonic() - begin, path)
    return path


def build(level: Level, folder: Path, *, compiler: str | None = None) -> Path:
    """Compile the library of `level` into `folder`. Raises TierUnavailable, or OSError for the folder."""
    import tempfile  # here: most starts build nothing

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name(level)
    handle, temporary = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=folder)
    os.close(handle)
    try:
        _compile(level, Path(temporary), compiler=compiler or os.environ.get("CC") or "cc")
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def library_name(level: Level) -> str:
    """File name of a level's library: the hash covers sources and flags."""
    digest = hashlib.sha256("\0".join(_flags(level)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".c", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"libheadwater-{level.name}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where libraries that were built on this machine are kept."""
    own = os.environ.get("HEADWATER_CACHE")
    if own:
        return Path(own).expanduser() / "native"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache") / "headwater" / "native"


def _flags(level: Level) -> tuple[str, ...]:
    more = os.environ.get(KERNEL_FLAGS_VARIABLE, "").split()
    return (*COMMON_FLAGS, *level.compiler_flags, f'-DSIMD_HEADER="{level.header}"', *more)


def _compile(level: Level, target: Path, *, compiler: str) -> None:
    import subprocess

    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    command = [compiler, *_flags(level), *sources, "-o", str(target), "-lpthread", "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TierUnavailable(
            f"the native kernels need a compiler and {compiler!r} did not run ({error})", remedy=REMEDY
        ) from error
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise TierUnavailable(f"{compiler!r} could not build the native kernels: {first}", remedy=REMEDY)


def main() -> int:
    """Build all levels into the package's lib/ folder, and drop libraries of other sources."""
    PREBUILT.mkdir(exist_ok=True)
    wanted = {library_name(level) for level in LEVELS}
    for stale in PREBUILT.glob("libheadwater-*.so"):
        if stale.name not in wanted:
            stale.unlink()
    for level in LEVELS:
        if not (PREBUILT / library_name(level)).is_file():
            build(level, PREBUILT)
        sys.stdout.write(f"{PREBUILT / library_name(level)}\n")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except TierUnavailable as unavailable:
        raise SystemExit(f"{unavailable.reason}; {unavailable.remedy}") from None
