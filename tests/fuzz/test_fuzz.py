"""500 cases of the fuzzer, the same ones each time; `make fuzz` runs many more, of every phase."""

from pathlib import Path

import pytest

from tests.fuzz.run import Counts, fuzz, scripted_server


@pytest.mark.timeout(600)
def test_the_api_is_what_its_document_says(tmp_path: Path) -> None:
    counts = Counts()
    with scripted_server(tmp_path / "server.log") as url:
        done = fuzz(url, counts, seed=1, max_examples=30, phases="examples,fuzzing,stateful")
    assert done.returncode == 0, done.stdout
    assert counts.cases.total() >= 500 and len(counts.operations) >= 15
    assert counts.cases["valid 200"] >= 100 and counts.cases["invalid 400"] >= 50
