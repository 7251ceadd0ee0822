"""How the next model takes over, and that a server says which of its engines it means."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from app.reload import Way, choose_way
from app.settings import GIB, Settings
from app.weights import Model, read_model
from tests.engine_facts import LIMITS
from tests.store_models import model_files, write_folder

ROOM = msgspec.structs.replace(LIMITS, kv_bytes=2 * GIB, weight_bytes=3 * GIB)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    from app.store import resolve

    folder = resolve(str(write_folder(tmp_path / "one", model_files())), report=lambda line: None)
    return read_model(Settings(), folder)


def again(model: Model) -> Model:
    return read_model(Settings(), model.folder)


def way(old: Model, new: Model, *, overlap: str = "auto", available: int = 100 * GIB, device: str = "cpu") -> Way:
    limits = msgspec.structs.replace(ROOM, device=device)
    return choose_way(old, new, limits, overlap=overlap, available=available)[0]


def test_the_same_files_and_settings_are_handed_over(model: Model) -> None:
    assert way(model, again(model)) is Way.HAND_OVER
    assert way(model, again(model), overlap="never", available=0, device="cuda") is Way.HAND_OVER


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_no_engine_reads_makes_no_other_model(model: Model, name: str) -> None:
    (model.folder.path / name).write_text("{}")
    assert way(model, again(model)) is Way.HAND_OVER


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_was_written_again_makes_another_model(model: Model, name: str) -> None:
    path = model.folder.path / name
    path.write_bytes(path.read_bytes())
    assert way(model, again(model)) is Way.BESIDE


def test_other_ends_make_another_model(model: Model) -> None:
    """They are in generation_config.json, which no engine reads, and in what it is told."""
    other = replace(model, config=msgspec.structs.replace(model.config, eos_token_ids=(9,)))
    assert way(model, other) is Way.BESIDE


def test_both_run_at_once_where_memory_holds_both(model: Model) -> None:
    larger = msgspec.structs.replace(model.folder, num_parameters=2 * model.folder.num_parameters)
    other = Model(larger, model.config, frozenset())
    needed = 2 * 3 * GIB + 2 * 2 * GIB
    assert way(model, other, available=needed) is Way.BESIDE
    assert way(model, other, available=needed - 1) is Way.AFTER
    assert way(model, other, device="cuda") is Way.AFTER, "its memory is not seen from here"
    assert way(model, other, overlap="always", available=0, device="cuda") is Way.BESIDE
    assert way(model, other, overlap="never") is Way.AFTER
