"""A recipe: everything that a pretraining run depends on, read from TOML and checked before anything starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from app.core.errors import ConfigurationError

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a recipe."""


AnyTable = TypeVar("AnyTable", bound=Table)


class ModelTable(Table, frozen=True, kw_only=True):
    """The shape. `gpt2`: learned positions, LayerNorm, GELU. `llama`: RoPE, RMSNorm, SwiGLU, grouped queries."""

    architecture: Literal["llama", "gpt2"]
    hidden_size: Count
    layers: Count
    heads: Count
    context: Count
    kv_heads: Count | None = None
    """llama only; None: as many as heads."""
    intermediate_size: Count | None = None
    """None: 4 times hidden_size for gpt2, 8/3 rounded up to 64 for llama."""
    dropout: Share = 0.0
    rope_theta: float = 10_000.0


class ScheduleTable(Table, frozen=True, kw_only=True):
    """Learning rate by step: linear warm-up, then a cosine, or constant and linear decay at the end (`wsd`)."""

    kind: Literal["cosine", "wsd"]
    learning_rate: Annotated[float, Meta(gt=0, le=10)]
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    decay_steps: Annotated[int, Meta(ge=0)] = 0
    """wsd only: the last steps."""
    last_share: Share = 0.1
    """Of the learning rate, at the last step."""


class TrainTable(Table, frozen=True, kw_only=True):
    """The loop."""

    steps: Count
    rows_per_step: Count
    """Of all processes and accumulation together."""
    accumulation: Count = 1
    """Forward passes a step; divides rows_per_step."""
    schedule: ScheduleTable
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: for the matrices between embeddings and head; the rest is AdamW's."""
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.1
    """On matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    seed: int = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: bool = False
    threads: Annotated[int, Meta(ge=0)] = 0
    """0: torch's own choice."""


class RunTable(Table, frozen=True, kw_only=True):
    """What is written, and how often (in steps)."""

    folder: str
    log_every: Count = 10
    evaluate_every: Count = 200
    evaluate_rows: Count = 64
    sample_every: Count = 500
    sample_tokens: Count = 48
    prompts: tuple[str, ...] = ("",)
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 2
    save_dtype: Literal["float32", "bfloat16"] = "float32"


class Recipe(Table, frozen=True, kw_only=True):
    """The whole file."""

    data: str
    """Folder that `headwater tokenizer` wrote, relative to the recipe."""
    model: ModelTable
    train: TrainTable
    run: RunTable


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; the paths in it become absolute.

    Raises:
        ConfigurationError: it is missing, no TOML, or a value does not fit; says which.
    """
    recipe = read_recipe(path, Recipe)
    _check(recipe, path)
    base = path.parent.resolve()
    run = msgspec.structs.replace(recipe.run, folder=str(base / recipe.run.folder))
    return msgspec.structs.replace(recipe, data=str(base / recipe.data), run=run)


def read_recipe(path: Path, kind: type[AnyTable]) -> AnyTable:
    """Read a TOML file as a struct.

    Raises:
        ConfigurationError: it is missing, no TOML, or has a field that does not fit.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"the recipe {path} cannot be used: {error}") from error


def refuse(path: Path, wrong: Mapping[str, object]) -> None:
    """Raise ConfigurationError with the first message whose value is true."""
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigurationError(f"the recipe {path} cannot be used: {message}")


def _check(recipe: Recipe, path: Path) -> None:
    model, train, schedule = recipe.model, recipe.train, recipe.train.schedule
    kv_heads = model.heads if model.kv_heads is None else model.kv_heads
    wrong: dict[str, object] = {
        f"model.hidden_size {model.hidden_size} is no multiple of model.heads {model.heads}": model.hidden_size
        % model.heads,
        f"model.heads {model.heads} is no multiple of model.kv_heads {kv_heads}": model.heads % kv_heads,
        "model.kv_heads is for llama only": model.architecture == "gpt2" and model.kv_heads is not None,
        f"train.rows_per_step {train.rows_per_step} is no multiple of train.accumulation {train.accumulation}": (
            train.rows_per_step % train.accumulation
        ),
        f"warmup_steps and decay_steps are more than train.steps {train.steps}": (
            schedule.warmup_steps + schedule.decay_steps > train.steps
        ),
        "schedule.decay_steps is for wsd only": schedule.kind == "cosine" and schedule.decay_steps,
    }
    refuse(path, wrong)
