"""Golden tokens: outputs that change without a new epoch in the fingerprint fail here."""

import json
from pathlib import Path

import pytest

from app.runner.native.levels import ISA_VARIABLE, LEVELS
from app.runner.native.loader import KERNEL_EPOCH
from app.runner.sampling import SAMPLER_EPOCH
from tests.golden.make_native_golden import CATALOGUE_MODEL, MODES, PATH, default_model, golden_tokens, trained_tokens
from tests.native_models import levels_here, write_model


def test_epochs_are_those_of_the_file() -> None:
    golden = json.loads(PATH.read_text())
    assert (golden["kernel_epoch"], golden["sampler_epoch"]) == (KERNEL_EPOCH, SAMPLER_EPOCH)


@pytest.fixture(params=[level.name for level in LEVELS])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name not in levels_here():
        pytest.skip(f"this CPU lacks {name}: its golden tokens are NOT checked here")
    monkeypatch.setenv(ISA_VARIABLE, name)
    return name


def test_tokens_are_the_golden_ones(level: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    expected = json.loads(PATH.read_text())["tokens"][level]
    assert {mode: golden_tokens(folder, mode) for mode in MODES} == {mode: expected[mode] for mode in MODES}


def test_trained_weights_bring_the_golden_tokens(level: str) -> None:
    folder = default_model()
    if folder is None:
        pytest.skip(f"{CATALOGUE_MODEL} is not in the cache: its golden tokens are NOT checked here")
    assert trained_tokens(folder) == json.loads(PATH.read_text())["tokens"][level][CATALOGUE_MODEL]
