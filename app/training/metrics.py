"""`metrics.jsonl`: one JSON object a line, in the order of the steps. A resumed run drops what lay ahead of it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

Record = Mapping[str, object]


class MetricsFile:
    """Appends records, unbuffered: a reader sees each line at once, and a full disk is told where it is met."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        kept = [record for record in read_metrics(path) if int(str(record["step"])) <= resumed_step]
        self.path = path
        self._file = path.open("wb", buffering=0)
        for record in kept if resumed_step else []:
            self.write(record)

    def write(self, record: Record) -> None:
        """Add one line. Raises OSError where it cannot be written."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[Record]:
    """Every whole line of the file; nothing where there is none."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return  # a line that a kill cut short: the last
