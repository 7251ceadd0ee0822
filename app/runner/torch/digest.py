"""A name for a folder's weights that two starts agree on.

The manifest's hashes where the folder has one (`headwater.json`); else config.json, the names and sizes
of the weight files, their headers and samples of their data: a full hash of a large checkpoint would
take longer than loading it.
"""

import hashlib
import json
from pathlib import Path

_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 16


def weights_digest(folder: Path) -> str:
    """16 hexadecimal digits."""
    digest = hashlib.sha256()
    config = folder / "config.json"
    digest.update(config.read_bytes())
    listed = _manifest_hashes(folder / "headwater.json")
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        if path.name in listed:
            digest.update(listed[path.name].encode())
        else:
            _add_samples(digest, path)
    return digest.hexdigest()[:16]


def _manifest_hashes(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_bytes())["files"]
        return {file["path"]: file["sha256"] for file in files}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _add_samples(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for index in range(_NUM_SAMPLES):
            file.seek(index * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
