"""The loop against what is known of it: first loss, gradients, overfitting, resumption, and stops."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from app.cli import main
from app.core.errors import ConfigurationError
from app.training.checkpoint import last_checkpoint
from app.training.errors import TrainingStopped
from app.training.metrics import read_metrics
from app.training.model import build_model, packed_logits, summed_loss
from app.training.packing import NO_LABEL, PackedRows, Rows
from app.training.pretrain import pretrain
from app.training.recipe import ModelTable
from app.training.run import open_run, save
from app.training.shards import open_shards
from app.training.step import train_step
from tests.training_texts import make_shards, toy_recipe, write_recipe

CPU = torch.device("cpu")
Architecture = Literal["llama", "gpt2"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gpt2")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, shared by the runs of this module."""
    folder = tmp_path_factory.mktemp("training")
    make_shards(folder)
    return folder


def packed(root: Path, *, context: int, count: int) -> Rows:
    """Rows, of which at least one holds several documents."""
    rows = PackedRows(open_shards(root / "data").train, context=context, seed=2).rows(0, count)
    assert rows.documents.max() > 0
    return rows


def losses(root: Path, name: str) -> dict[int, float]:
    records = read_metrics(root / f"{name}-run" / "metrics.jsonl")
    return {int(str(record["step"])): float(str(record["loss"])) for record in records if "loss" in record}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hidden_size", [64, 384])
def test_first_loss_is_the_logarithm_of_the_vocabulary(
    root: Path, architecture: Architecture, hidden_size: int
) -> None:
    table = ModelTable(architecture=architecture, hidden_size=hidden_size, layers=3, heads=4, context=64)
    model = build_model(table, vocab_size=320, start_id=1, end_id=0, seed=4)
    rows = packed(root, context=64, count=24)
    loss = float(summed_loss(packed_logits(model, rows, device=CPU, dtype=torch.float32), rows).detach())
    assert loss / (rows.labels != NO_LABEL).sum() == pytest.approx(math.log(320), rel=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_packed_rows_equal_those_of_lone_documents_in_float64(
    root: Path, architecture: Architecture
) -> None:
    table = ModelTable(architecture=architecture, hidden_size=32, layers=2, heads=2, context=128)
    rows = packed(root, context=128, count=4)
    model = build_model(table, vocab_size=320, start_id=1, end_id=0, seed=4).eval()
    summed_loss(packed_logits(model, rows, device=CPU, dtype=torch.float32), rows).backward()
    reference = build_model(table, vocab_size=320, start_id=1, end_id=0, seed=4).eval().double()
    for row in range(len(rows.token_ids)):
        for document in range(int(rows.documents[row].max()) + 1):
            inside = rows.documents[row] == document
            ids, labels = (torch.from_numpy(array[row][inside]) for array in (rows.token_ids, rows.labels))
            logits = reference(input_ids=ids[None]).logits[0]
            nn.functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum").backward()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None, name
        error = (parameter.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_a_batch_of_one_document_is_learnt_by_heart(root: Path) -> None:
    run = open_run(toy_recipe(root, name="heart", steps=200, learning_rate=1e-2, hidden_size=64))
    document = open_shards(root / "data").train.document(0)[:32].astype(np.int64)
    rows = Rows(
        token_ids=document[None, :-1],
        labels=document[None, 1:],
        positions=np.arange(31)[None],
        documents=np.zeros((1, 31), np.int64),
    )
    run.rows = FixedRows(rows)  # type: ignore[assignment]  # a source of rows with one row
    while run.step < 150:
        loss, _ = train_step(run)
    run.metrics.close()
    assert loss < 0.01


class FixedRows:
    """The same rows at every step."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def rows(self, _first: int, _count: int) -> Rows:
        return self._rows


def test_only_matrices_decay(root: Path) -> None:
    run = open_run(toy_recipe(root, name="decay", architecture='"gpt2"'))
    run.metrics.close()
    (adamw,) = run.optimizer.parts
    decaying, plain = adamw.param_groups
    assert decaying["weight_decay"] > 0 and all(parameter.ndim == 2 for parameter in decaying["params"])
    assert plain["weight_decay"] == 0 and all(parameter.ndim == 1 for parameter in plain["params"])
    assert len(decaying["params"]) + len(plain["params"]) == len(list(run.model.parameters()))


def test_accumulated_pieces_make_the_same_step(root: Path) -> None:
    together, apart = (
        open_run(toy_recipe(root, name=f"pieces{pieces}", accumulation=pieces, rows_per_step=8)) for pieces in (1, 4)
    )
    for run in (together, apart):
        results = [train_step(run) for _ in range(3)]
        run.metrics.close()
        if run is together:
            expected = results
    assert results == [pytest.approx(pair, rel=1e-4) for pair in expected]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_muon_moves_the_hidden_matrices_and_adamw_the_rest(root: Path, architecture: Architecture) -> None:
    run = open_run(toy_recipe(root, name="muon", architecture=f'"{architecture}"', optimizer='"muon"'))
    run.metrics.close()
    adamw, muon = run.optimizer.parts
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    of_adamw, of_muon = (
        [parameter for group in part.param_groups for parameter in group["params"]] for part in (adamw, muon)
    )
    assert {*of_adamw, *of_muon} == set(names) and len(of_adamw) + len(of_muon) == len(names)
    hidden = {
        parameter for parameter, name in names.items() if parameter.ndim == 2 and (".layers." in name or ".h." in name)
    }
    assert set(of_muon) == hidden


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_unbroken_one(root: Path, optimizer: str) -> None:
    """With dropout, so that the random state counts; stopped between checkpoints."""
    changes: dict[str, object] = {"architecture": '"gpt2"', "dropout": 0.1, "optimizer": f'"{optimizer}"'}
    finished = pretrain(toy_recipe(root, name=f"whole-{optimizer}", **changes))
    broken = toy_recipe(root, name=f"broken-{optimizer}", **changes)
    run = open_run(broken)
    for _ in range(5):
        train_step(run)
    save(run)
    run.metrics.close()
    model = pretrain(broken)
    assert finished is not None and model is not None
    after = losses(root, f"broken-{optimizer}")
    assert list(after) == [6, 7, 8]
    assert after == {step: loss for step, loss in losses(root, f"whole-{optimizer}").items() if step > 5}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (finished / name).read_bytes(), name
    assert "<svg" in (root / f"whole-{optimizer}-run" / "report.html").read_text()


def test_a_run_is_not_resumed_with_another_recipe_or_tokenizer(root: Path) -> None:
    run = open_run(toy_recipe(root, name="fixed"))
    train_step(run)
    path = save(run)
    run.metrics.close()
    with pytest.raises(ConfigurationError, match=r"made with model.layers = 2, the recipe now says 3"):
        open_run(toy_recipe(root, name="fixed", layers=3))
    open_run(toy_recipe(root, name="fixed", steps=20)).metrics.close()
    state = json.loads((path / "state.json").read_text()) | {"tokenizer_sha256": "another"}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigurationError, match="trained with another tokenizer"):
        open_run(toy_recipe(root, name="fixed"))
    (path / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigurationError, match=r"step-000001 is damaged"):
        open_run(toy_recipe(root, name="fixed"))


def test_a_loss_that_is_no_number_stops_with_step_rows_and_checkpoint(root: Path) -> None:
    run = open_run(toy_recipe(root, name="nan"))
    train_step(run)
    save(run)
    with torch.no_grad():
        next(run.model.parameters())[:] = math.nan
    with pytest.raises(TrainingStopped, match=r"loss of step 2 is nan \(rows 4 to 7, .*step-000001"):
        train_step(run)
    run.metrics.close()
    assert run.step == 1


def test_a_full_disk_leaves_the_last_good_checkpoint(root: Path) -> None:
    run = open_run(toy_recipe(root, name="full"))
    train_step(run)
    good = save(run)
    train_step(run)
    draft = run.folder / "checkpoints" / ".draft-step-000002"
    # A file where the draft's folder would be: writing fails as on a disk without room, for root too.
    draft.write_text("in the way")
    with pytest.raises(TrainingStopped, match=r"checkpoint of step 2 cannot be written.*step-000001"):
        save(run)
    run.metrics.close()
    assert last_checkpoint(run.folder / "checkpoints") == good
    draft.unlink()
    open_run(toy_recipe(root, name="full")).metrics.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html"])
def test_a_full_disk_beside_the_checkpoints_ends_the_run_in_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    recipe = write_recipe(root, name="full-run-folder")
    folder = root / "full-run-folder-run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).symlink_to("/dev/full")
    assert main(["pretrain", str(recipe)]) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("headwater:"))
    assert "No space left on device" in error and "There is no checkpoint yet" in error


def test_sigterm_ends_a_run_with_a_checkpoint(root: Path) -> None:
    recipe = write_recipe(root, name="term", steps=100_000, checkpoint_every=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "pretrain", str(recipe)], stderr=subprocess.PIPE, text=True
    )
    metrics = root / "term-run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and '"loss"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    path = last_checkpoint(root / "term-run" / "checkpoints")
    assert path is not None
    assert f"stopped after step {int(path.name.removeprefix('step-'))}" in errors


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(root: Path) -> None:
    assert pretrain(toy_recipe(root, name="one")) is not None
    recipe = write_recipe(root, name="two")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "app.cli", "pretrain", str(recipe)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("serve it with") == 1
    assert losses(root, "two") == pytest.approx(losses(root, "one"), rel=1e-4)
