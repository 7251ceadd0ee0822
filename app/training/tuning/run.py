"""A fine-tuning run in progress: its scores, the best weights so far, restored from and saved as checkpoints.

In the run folder lie `checkpoints/`, of which the last one is whole, and `best/step-NNNNNN.safetensors`: the weights
with the lowest validation loss. The file that a checkpoint tells of stays until the next checkpoint is there.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from torch import nn

from app.core.errors import ConfigurationError
from app.training.checkpoint import (
    Checkpoint,
    CheckpointState,
    last_checkpoint,
    last_good,
    load_checkpoint,
    make_run_folder,
    put_back,
    require_same_tables,
    save_checkpoint,
    write_whole,
)
from app.training.devices import choose_dtype
from app.training.errors import TrainingStopped
from app.training.metrics import MetricsFile
from app.training.optimizer import Optimizer
from app.training.run_clock import RunClock
from app.training.tuning.encoding import Encoded
from app.training.tuning.methods import make_tuner, moving_weights
from app.training.tuning.recipe import TuningRecipe

_CHECKPOINTS, _BEST = "checkpoints", "best"
_MAY_CHANGE = frozenset(["epochs", "patience", "threads", "learning_rate", "clip_norm"])
"""When a run is resumed: a longer run, and what helps against a loss that is no number."""


@dataclass(frozen=True)
class Score:
    """Over the validation examples."""

    loss: float
    """Nats a token of the answers."""
    exact: float
    """Share of examples whose every answer token is the model's first choice: what greedy decoding gets right."""

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {math.exp(min(self.loss, 100.0)):.2f}, exact answers {self.exact:.1%}"


class TuningState(CheckpointState, frozen=True, kw_only=True):
    """What is no tensor in a checkpoint of fine-tuning."""

    inputs_sha256: str
    before: Score
    best: float
    best_step: int
    num_worse: int


@dataclass(kw_only=True)
class Tuning(RunClock):
    """A run in progress; only `tune_step` and the loop change it."""

    recipe: TuningRecipe
    model: nn.Module
    optimizer: Optimizer
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    inputs_sha256: str
    """Of the weights that it began with, and of the examples."""
    device: torch.device
    metrics: MetricsFile
    before: Score | None = None
    """Before the first step."""
    best: float = math.inf
    best_step: int = 0
    num_worse: int = 0
    """Evaluations since the best."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.recipe.run.folder)

    @property
    def steps_per_epoch(self) -> int:
        """The last one of an epoch may have fewer examples."""
        return -(-len(self.train) // self.recipe.train.examples_per_step)

    @property
    def steps(self) -> int:
        """Of the whole run, where it does not end early."""
        return self.recipe.train.epochs * self.steps_per_epoch

    @property
    def dtype(self) -> torch.dtype:
        """In which matrices are multiplied."""
        return choose_dtype(self.recipe.train.dtype, self.device)

    @property
    def is_worn_out(self) -> bool:
        """Whether it ends early: validation no longer improves."""
        return self.num_worse >= self.recipe.train.patience


def open_tuning(
    recipe: TuningRecipe,
    model: nn.Module,
    *,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    inputs_sha256: str,
    device: torch.device,
) -> Tuning:
    """Put back the last checkpoint of the run folder, if it has one.

    Raises:
        ConfigurationError: the checkpoint is damaged or of another run, or the folder cannot be written.
    """
    optimizer, folder = make_tuner(model, recipe.train), Path(recipe.run.folder)
    state = _restore(model, optimizer, recipe, inputs_sha256=inputs_sha256)
    make_run_folder(folder, recipe)
    run = Tuning(
        recipe=recipe,
        model=model,
        optimizer=optimizer,
        train=train,
        validation=validation,
        inputs_sha256=inputs_sha256,
        device=device,
        metrics=MetricsFile(folder / "metrics.jsonl", resumed_step=state.step if state else 0),
    )
    if state is not None:
        run.step, run.seconds, run.before = state.step, state.seconds, state.before
        run.best, run.best_step, run.num_worse = state.best, state.best_step, state.num_worse
    return run


def inputs_digest(model: nn.Module, *examples: Sequence[Encoded]) -> str:
    """The sha256 of all weights, which are in float32 on the CPU, and of the examples."""
    digest = hashlib.sha256(msgspec.json.encode(examples))
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def save(run: Tuning) -> None:
    """Write a checkpoint of the run as it is, then drop best weights that are no longer the best.

    Raises:
        TrainingStopped: it cannot be written; the one before it is as it was.
    """
    assert run.before is not None
    state = TuningState(
        step=run.step,
        seconds=run.elapsed,
        recipe=msgspec.Raw(msgspec.json.encode(run.recipe)),
        inputs_sha256=run.inputs_sha256,
        before=run.before,
        best=run.best,
        best_step=run.best_step,
        num_worse=run.num_worse,
    )
    checkpoint = Checkpoint(
        state=state,
        weights=dict(moving_weights(run.model)),
        moments=run.optimizer.tensors(run.model),
        random_state=torch.get_rng_state(),
    )
    try:
        save_checkpoint(run.folder / _CHECKPOINTS, checkpoint, keep=1)
    except OSError as error:
        raise TrainingStopped(
            f"the checkpoint of step {run.step} cannot be written: {error}. {what_is_kept(run)}"
        ) from error
    for file in (run.folder / _BEST).iterdir():
        if file != best_file(run):
            file.unlink()


def keep_best(run: Tuning, score: Score) -> None:
    """Note that the weights of now are the best so far. Raises OSError with those before them as they were."""
    step = run.step
    write_whole(run.folder / _BEST / _best_name(step), moving_weights(run.model))
    run.best, run.best_step, run.num_worse = score.loss, step, 0


def take_best(run: Tuning) -> None:
    """Give the model the best weights so far."""
    weights = load_file(best_file(run))
    with torch.no_grad():
        for name, parameter in moving_weights(run.model).items():
            parameter.copy_(weights[name])


def best_file(run: Tuning) -> Path:
    """Of the best weights so far."""
    return run.folder / _BEST / _best_name(run.best_step)


def what_is_kept(run: Tuning) -> str:
    """What is left of the run, as the end of a message."""
    kept = last_good(run.folder / _CHECKPOINTS)
    return f"{kept}, the best weights so far are in {best_file(run)}" if best_file(run).is_file() else kept


def _best_name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def _restore(model: nn.Module, optimizer: Optimizer, recipe: TuningRecipe, *, inputs_sha256: str) -> TuningState | None:
    folder = Path(recipe.run.folder)
    path = last_checkpoint(folder / _CHECKPOINTS)
    if path is None:
        for remains in (_CHECKPOINTS, _BEST):
            shutil.rmtree(folder / remains, ignore_errors=True)
        return None
    checkpoint = load_checkpoint(path, TuningState)
    state = checkpoint.state
    _require_same(path, state, recipe, inputs_sha256=inputs_sha256)
    best = folder / _BEST / _best_name(state.best_step)
    if not best.is_file():
        raise ConfigurationError(f"{path} needs {best}, which is gone; use a new run folder")
    put_back(checkpoint, moving_weights(model), model, optimizer)
    return state


def _require_same(path: Path, state: TuningState, recipe: TuningRecipe, *, inputs_sha256: str) -> None:
    before = msgspec.json.decode(state.recipe, type=TuningRecipe)
    require_same_tables(path, before, recipe, tables=["method", "train"], may_change=_MAY_CHANGE)
    if state.inputs_sha256 != inputs_sha256:
        raise ConfigurationError(
            f"{path} was made from another model or from other examples than the recipe names now; use a new run folder"
        )
