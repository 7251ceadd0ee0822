"""The model that comes with Headwater: what it promises, and that it needs no network."""

import json
from pathlib import Path

import pytest

from app.core.errors import ConfigurationError
from app.settings import OFFLINE_MODEL, load_settings
from app.store import catalogue, list_models, resolve
from app.text.chat_template import ChatTemplate
from app.training.recipe import load_recipe

MOST_BYTES = 12_000_000
MOST_PARAMETERS = 3_000_000


def quiet(_line: str) -> None:
    """Reports are not wanted here."""


def test_it_is_found_without_a_cache_or_a_network(tmp_path: Path) -> None:
    folder = resolve(OFFLINE_MODEL, cache_dir=tmp_path / "nothing", is_offline=True, report=quiet)
    assert (folder.name, folder.source, folder.licence) == (OFFLINE_MODEL, "comes with Headwater", "Apache-2.0")
    assert folder.num_parameters <= MOST_PARAMETERS
    assert folder.max_model_len == catalogue()[OFFLINE_MODEL].context_length
    assert folder.eos_token_ids and ChatTemplate.load(folder.path) is not None
    assert not (tmp_path / "nothing").exists()
    assert sum(file.stat().st_size for file in folder.path.iterdir() if file.is_file()) <= MOST_BYTES


def test_it_is_what_offline_serves_without_a_name() -> None:
    assert load_settings(offline=True).model == OFFLINE_MODEL
    assert load_settings(offline=True, model="other").model == "other"
    assert load_settings().model != OFFLINE_MODEL


@pytest.mark.parametrize("model", ["smollm2-135m-instruct-q4", "someone/something"])
def test_offline_refuses_what_would_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ConfigurationError, match="--offline"):
        resolve(model, cache_dir=tmp_path, is_offline=True, report=quiet)


def test_it_is_listed_as_here(tmp_path: Path) -> None:
    row = {row.name: row for row in list_models(cache_dir=tmp_path)}[OFFLINE_MODEL]
    assert row.is_cached and row.path is not None and row.num_bytes is not None
    assert not row.is_default


def test_its_recipe_and_measurements_are_beside_it() -> None:
    path = resolve(OFFLINE_MODEL, report=quiet).path
    recipe = load_recipe(path / "recipe.toml")
    config = json.loads((path / "config.json").read_text())
    assert (recipe.model.hidden_size, recipe.model.layers) == (config["hidden_size"], config["num_hidden_layers"])
    assert config["vocab_size"] == 4096
    measured = json.loads((path / "measured.json").read_text())
    card = (path / "README.md").read_text()
    assert f"{measured['bits_per_byte']:.3f}" in card
    assert f"{measured['kneser_ney_5_bits_per_byte']:.3f}" in card
    assert "<svg" in (path / "report.html").read_text()


def test_its_measurements_meet_the_marks() -> None:
    """What models/rill-stories-3m/measure.py wrote."""
    measured = json.loads((resolve(OFFLINE_MODEL, report=quiet).path / "measured.json").read_text())
    assert measured["under_kneser_ney"] >= 0.15
    assert measured["nll_ratio"] <= 1.25
    assert measured["repeated_4grams"] <= 0.05
    assert measured["perplexity_served"] == pytest.approx(measured["perplexity_float32"], rel=5e-3)
