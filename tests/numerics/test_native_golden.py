"""Golden tokens: outputs that change without a new epoch in the fingerprint fail here."""

import json
from pathlib import Path

import pytest

from app.runner.native.levels import ISA_VARIABLE, LEVELS
from app.runner.native.load import KERNEL_EPOCH
from app.runner.sampling import SAMPLER_EPOCH
from tests.golden.make_native_golden import MODES, PATH, golden_tokens
from tests.native_models import levels_here, write_model


def test_epochs_are_those_of_the_file() -> None:
    golden = json.loads(PATH.read_text())
    assert (golden["kernel_epoch"], golden["sampler_epoch"]) == (KERNEL_EPOCH, SAMPLER_EPOCH)


@pytest.mark.parametrize("level", [level.name for level in LEVELS])
def test_tokens_are_the_golden_ones(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if level not in levels_here():
        pytest.skip(f"this CPU lacks {level}: its golden tokens are NOT checked here")
    monkeypatch.setenv(ISA_VARIABLE, level)
    folder = write_model(tmp_path)
    expected = json.loads(PATH.read_text())["tokens"][level]
    assert {mode: golden_tokens(folder, mode) for mode in MODES} == expected
