"""Checkpoints: `checkpoints/step-NNNNNN/`, each whole or not there, the last few kept.

A checkpoint is written beside its place, synced, and renamed into it; older ones are deleted afterwards. A full disk
or a kill at any moment leaves the last good one. Tensors are safetensors, the rest JSON: nothing is pickled.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.core.errors import ConfigurationError
from app.training.optimizer import Optimizer

_NAME = re.compile(r"step-(\d{6,})")
_STATE, _WEIGHTS, _MOMENTS, _RANDOM = "state.json", "weights.safetensors", "moments.safetensors", "random.safetensors"


class CheckpointState(msgspec.Struct, frozen=True, kw_only=True):
    """What is no tensor; each kind of run adds what it needs."""

    step: int
    """Steps done."""
    seconds: float
    """Of training, over all runs."""
    recipe: msgspec.Raw


State = TypeVar("State", bound=CheckpointState)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Generic[State]):
    """Everything that the next step depends on."""

    state: State
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    random_state: Tensor


def save_checkpoint(folder: Path, checkpoint: Checkpoint[State], *, keep: int) -> Path:
    """Write one, then delete the oldest beyond `keep`. Raises OSError with every earlier one as it was."""
    target = folder / f"step-{checkpoint.state.step:06d}"
    draft = folder / f".draft-{target.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _save_tensors(checkpoint.weights, draft / _WEIGHTS)
        _save_tensors(checkpoint.moments, draft / _MOMENTS)
        _save_tensors({"random_state": checkpoint.random_state}, draft / _RANDOM)
        (draft / _STATE).write_bytes(msgspec.json.encode(checkpoint.state))
        _sync(draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for _, old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one, None where there is none."""
    found = _checkpoints(folder)
    return found[-1][1] if found else None


def load_checkpoint(path: Path, state_type: type[State]) -> Checkpoint[State]:
    """Read one back, of a run that keeps such a state.

    Raises:
        ConfigurationError: a file of it is damaged.
    """
    try:
        return Checkpoint(
            state=msgspec.json.decode((path / _STATE).read_bytes(), type=state_type),
            weights=load_file(path / _WEIGHTS),
            moments=load_file(path / _MOMENTS),
            random_state=load_file(path / _RANDOM)["random_state"],
        )
    except (OSError, SafetensorError, msgspec.DecodeError, KeyError) as error:
        raise ConfigurationError(
            f"the checkpoint {path} is damaged: {error}; delete it to go on from an older one"
        ) from error


def require_same_tables(
    path: Path, before: msgspec.Struct, now: msgspec.Struct, *, tables: Iterable[str], may_change: Collection[str]
) -> None:
    """Raise ConfigurationError where a recipe is not the one that a checkpoint was made with.

    Args:
        tables: of the recipe, that a step depends on.
        may_change: fields of them that need not be the same.
    """
    for table in tables:
        for name in getattr(now, table).__struct_fields__:
            old, new = getattr(getattr(before, table), name), getattr(getattr(now, table), name)
            if old != new and name not in may_change:
                raise ConfigurationError(
                    f"{path} was made with {table}.{name} = {old!r}, the recipe now says {new!r}; "
                    "put it back, or use a new run folder"
                )


def put_back(
    checkpoint: Checkpoint[State], parameters: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer
) -> None:
    """Give weights, moments and random state the values that they had, so that the next step is the one that it was.

    Args:
        parameters: those that the checkpoint was made of, by name.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.weights[name])
    optimizer.restore(model, checkpoint.moments, step=checkpoint.state.step)
    torch.set_rng_state(checkpoint.random_state)


def make_run_folder(folder: Path, recipe: msgspec.Struct) -> None:
    """Make it where it is not there, and lay the recipe down in it. Raises ConfigurationError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_bytes(msgspec.json.format(msgspec.json.encode(recipe)) + b"\n")
    except OSError as error:
        raise ConfigurationError(f"the run folder {folder} cannot be written: {error}") from error


def last_good(folder: Path) -> str:
    """Which checkpoint of the folder a run can go on from, as the end of a message."""
    path = last_checkpoint(folder)
    return "There is no checkpoint yet" if path is None else f"The last good checkpoint is {path}"


def write_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of tensors, in place of one that was there, or leave that as it was.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".draft-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save_tensors(tensors, draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how the library tells a full disk
        raise OSError(str(error)) from error


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
