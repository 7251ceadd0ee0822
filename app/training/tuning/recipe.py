"""The recipe of a fine-tuning run, read from TOML and checked before anything starts."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.training.recipe import Count, Share, Table, read_recipe, refuse


class DataTable(Table, frozen=True, kw_only=True):
    """Examples to learn from, and examples that only measure."""

    files: Annotated[tuple[str, ...], Meta(min_length=1)]
    """Relative to the recipe: .jsonl files, text files, or folders of them."""
    validation_files: tuple[str, ...] = ()
    """Empty: a share of the examples is held out."""
    validation_share: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    chat_template: str | None = None
    """File, relative to the recipe, in place of the model's own; the new model carries it."""
    context: Annotated[int, Meta(ge=2)] = 1024
    """Most tokens of an example; longer ones are left out, and counted."""


class MethodTable(Table, frozen=True, kw_only=True):
    """What moves: the whole model, its last layers (with the final norm), or low-rank adapters (Hu et al. 2021)."""

    kind: Literal["whole", "last_layers", "lora"]
    layers: Count | None = None
    """last_layers only: how many."""
    rank: Count = 16
    alpha: Count = 32
    dropout: Share = 0.0
    """rank, alpha and dropout: lora only."""


class TrainTable(Table, frozen=True, kw_only=True):
    """The loop. The rate warms up, then falls to zero as a cosine."""

    epochs: Count = 3
    examples_per_step: Count = 8
    learning_rate: Annotated[float, Meta(gt=0, le=10)]
    """Of the last layer and what lies above it."""
    depth_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """What the rate is multiplied by for each layer further down; the embeddings lie below the first."""
    warmup_share: Share = 0.1
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.01
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    evaluate_every: Count | None = None
    """Steps; None: after each epoch."""
    patience: Count = 3
    """Evaluations without a lower validation loss after which the run ends."""
    seed: int = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    threads: Annotated[int, Meta(ge=0)] = 0


class RunTable(Table, frozen=True, kw_only=True):
    """What is written."""

    folder: str
    log_every: Count = 10
    checkpoint_every: Count = 100
    """Steps; one is written at the end, too."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    merge: bool = True
    """lora only: write the merged model too; without it, the adapter alone."""


class TuningRecipe(Table, frozen=True, kw_only=True):
    """The whole file."""

    model: str
    """A folder (relative to the recipe), or whatever else `headwater serve` takes."""
    data: DataTable
    method: MethodTable
    train: TrainTable
    run: RunTable


def load_tuning_recipe(path: Path) -> TuningRecipe:
    """Read and check a recipe; the paths in it become absolute.

    Raises:
        ConfigurationError: it is missing, no TOML, or a value does not fit; says which.
    """
    recipe = read_recipe(path, TuningRecipe)
    method, base = recipe.method, path.parent.resolve()
    refuse(
        path,
        {
            "method.kind last_layers needs method.layers": method.kind == "last_layers" and method.layers is None,
            "method.layers is for last_layers only": method.kind != "last_layers" and method.layers is not None,
            "run.merge is for lora only": method.kind != "lora" and not recipe.run.merge,
        },
    )
    data = msgspec.structs.replace(
        recipe.data,
        files=tuple(str(base / file) for file in recipe.data.files),
        validation_files=tuple(str(base / file) for file in recipe.data.validation_files),
        chat_template=None if recipe.data.chat_template is None else str(base / recipe.data.chat_template),
    )
    model = str(base / recipe.model) if (base / recipe.model).is_dir() else recipe.model
    run = msgspec.structs.replace(recipe.run, folder=str(base / recipe.run.folder))
    return msgspec.structs.replace(recipe, model=model, data=data, run=run)
