"""A pretraining run in progress: opened from its recipe and folder, restored from and saved as checkpoints."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import tokenizers
import torch
from torch import nn
from transformers import PreTrainedModel

from app.core.errors import ConfigurationError
from app.training.checkpoint import (
    Checkpoint,
    CheckpointState,
    last_checkpoint,
    load_checkpoint,
    make_run_folder,
    put_back,
    require_same_tables,
    save_checkpoint,
)
from app.training.checkpoint import last_good as last_good_of
from app.training.devices import choose_dtype
from app.training.errors import TrainingStopped
from app.training.metrics import MetricsFile
from app.training.model import build_model
from app.training.optimizer import Optimizer, make_optimizer
from app.training.packing import PackedRows
from app.training.recipe import Recipe
from app.training.run_clock import RunClock
from app.training.shards import Shards, open_shards
from app.training.tokenizer import END, START, load_tokenizer, special_id
from app.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
"""One process on the CPU."""
_MAY_CHANGE = frozenset(["steps", "threads", "schedule", "clip_norm", "compile"])
"""When a run is resumed: a longer run, an earlier decay, and what helps against a loss that is no number."""


class PretrainingState(CheckpointState, frozen=True, kw_only=True):
    """What is no tensor in a checkpoint of pretraining."""

    tokenizer_sha256: str


@dataclass(kw_only=True)
class Run(RunClock):
    """A run in progress; only `train_step` and the loop change it."""

    recipe: Recipe
    shards: Shards
    tokenizer: tokenizers.Tokenizer
    model: PreTrainedModel
    forward: nn.Module
    """The model as training steps call it: itself, or compiled."""
    optimizer: Optimizer
    workers: Workers
    dtype: torch.dtype
    rows: PackedRows
    heldout: PackedRows
    metrics: MetricsFile

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.recipe.run.folder)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.workers.device

    def describe(self) -> str:
        """One line: what is trained on what."""
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        train = self.recipe.train
        tokens = train.steps * train.rows_per_step * self.recipe.model.context
        return (
            f"{self.recipe.model.architecture}, {num_parameters / 1e6:.2f}M parameters, {self.device}, "
            f"{str(self.dtype).removeprefix('torch.')}; {train.steps} steps of "
            f"{train.rows_per_step * self.recipe.model.context:,} tokens = "
            f"{tokens / self.shards.facts.train.num_tokens:.1f} epochs; from step {self.step}"
        )


def open_run(recipe: Recipe, *, workers: Workers = ALONE) -> Run:
    """Open the data, build the model, and put back the last checkpoint.

    Raises:
        ConfigurationError: the data, the recipe, the run folder or the number of processes do not fit.
    """
    share = recipe.train.accumulation * workers.count
    if recipe.train.rows_per_step % share:
        raise ConfigurationError(
            f"train.rows_per_step {recipe.train.rows_per_step} is no multiple of {workers.count} processes times "
            f"train.accumulation {recipe.train.accumulation}"
        )
    shards = open_shards(Path(recipe.data))
    tokenizer = load_tokenizer(shards.folder)
    device = workers.device
    seed, context = recipe.train.seed, recipe.model.context
    model = build_model(
        recipe.model,
        vocab_size=shards.facts.vocab_size,
        start_id=special_id(tokenizer, START),
        end_id=special_id(tokenizer, END),
        seed=seed,
    ).to(device)
    torch.manual_seed(seed + workers.rank)  # each process drops out units of its own
    optimizer = make_optimizer(model, recipe.train)
    folder = Path(recipe.run.folder)
    rows, heldout = (PackedRows(split, context=context, seed=seed) for split in (shards.train, shards.heldout))
    step, seconds = _restore(model, optimizer, shards, recipe)
    if workers.is_first:
        make_run_folder(folder, recipe)
    return Run(
        recipe=recipe,
        shards=shards,
        tokenizer=tokenizer,
        model=model,
        forward=_compiled(model) if recipe.train.compile else model,
        optimizer=optimizer,
        workers=workers,
        dtype=choose_dtype(recipe.train.dtype, device),
        rows=rows,
        heldout=heldout,
        metrics=MetricsFile(folder / "metrics.jsonl" if workers.is_first else Path(os.devnull), resumed_step=step),
        step=step,
        seconds=seconds,
    )


def _compiled(model: PreTrainedModel) -> nn.Module:
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it is. Raises TrainingStopped where that fails."""
    state = PretrainingState(
        step=run.step,
        seconds=run.elapsed,
        recipe=msgspec.Raw(msgspec.json.encode(run.recipe)),
        tokenizer_sha256=run.shards.facts.tokenizer_sha256,
    )
    checkpoint = Checkpoint(
        state=state,
        weights=dict(run.model.named_parameters()),
        moments=run.optimizer.tensors(run.model),
        random_state=torch.get_rng_state(),
    )
    try:
        return save_checkpoint(run.folder / "checkpoints", checkpoint, keep=run.recipe.run.keep_checkpoints)
    except OSError as error:
        raise TrainingStopped(
            f"the checkpoint of step {run.step} cannot be written: {error}. {last_good(run)}"
        ) from error


def last_good(run: Run) -> str:
    """Which checkpoint the run can go on from, as the end of a message."""
    return last_good_of(run.folder / "checkpoints")


def _restore(model: PreTrainedModel, optimizer: Optimizer, shards: Shards, recipe: Recipe) -> tuple[int, float]:
    """Put the last checkpoint back: (steps done, seconds trained)."""
    folder = Path(recipe.run.folder) / "checkpoints"
    path = last_checkpoint(folder)
    if path is None:
        shutil.rmtree(folder, ignore_errors=True)
        return 0, 0.0
    checkpoint = load_checkpoint(path, PretrainingState)
    state = checkpoint.state
    _require_same(path, state, shards, recipe)
    put_back(checkpoint, dict(model.named_parameters()), model, optimizer)
    return state.step, state.seconds


def _require_same(path: Path, state: PretrainingState, shards: Shards, recipe: Recipe) -> None:
    before = msgspec.json.decode(state.recipe, type=Recipe)
    if state.tokenizer_sha256 != shards.facts.tokenizer_sha256:
        raise ConfigurationError(
            f"{path} was trained with another tokenizer than {shards.folder} has; use a new run folder"
        )
    require_same_tables(path, before, recipe, tables=["model", "train"], may_change=_MAY_CHANGE)
