"""The whole of `headwater finetune`: recipe → examples, model and run → folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from transformers import PreTrainedModel

from app.core.errors import ConfigurationError
from app.training.metrics import MetricsFile
from app.training.tuning.adapters import merged, write_adapter
from app.training.tuning.encoding import Encoded, Encoder
from app.training.tuning.examples import Example, read_examples
from app.training.tuning.methods import choose_parameters, make_tuner, moving_weights
from app.training.tuning.publish import end_ids, open_base, require_apart, write_model
from app.training.tuning.recipe import DataTable, TuningRecipe
from app.training.tuning.tune import Score, Tuning, require_some, tune

_MODEL = "model"
FindModel = Callable[[str], Path]
"""From what `headwater serve` takes as MODEL to a folder of it."""


@dataclass(frozen=True)
class Finished:
    """What a run led to."""

    folder: Path
    """Of the model, or of the adapter alone."""
    before: Score
    after: Score


def finetune(recipe: TuningRecipe, *, find_model: FindModel) -> Finished:
    """Learn, and write what was learnt.

    Raises:
        ConfigurationError: the recipe, its examples and the model do not fit.
        TrainingStopped: the loss is no number, or a file cannot be written.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    train, validation = split_examples(recipe.data, seed=recipe.train.seed)
    base_folder = find_model(recipe.model)
    require_apart(base_folder, Path(recipe.run.folder) / _MODEL)
    base, tokenizer = open_base(base_folder)
    template = _read_template(recipe.data.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    ends = end_ids(base_folder, base.config.to_dict())
    encoder = Encoder(tokenizer, end_id=ends[0])
    context = min(recipe.data.context, base.config.max_position_embeddings)
    parts = [_encode(encoder, examples, context=context) for examples in (train, validation)]
    for what, (encoded, _) in zip(("training", "validation"), parts, strict=True):
        require_some(encoded, context=context, what=what)
    folder = Path(recipe.run.folder)
    _make_folder(folder, recipe)
    torch.manual_seed(recipe.train.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = choose_parameters(base, recipe.method, base=recipe.model).to(device).train()
    run = Tuning(
        recipe=recipe,
        model=model,
        optimizer=make_tuner(model, recipe.train),
        train=parts[0][0],
        validation=parts[1][0],
        device=device,
        metrics=MetricsFile(folder / "metrics.jsonl", resumed_step=0),
    )
    before, after = tune(run, description=_describe(run, num_too_long=parts[0][1] + parts[1][1], context=context))
    target = _publish(run, base_folder, turn_ends=encoder.turn_ends, chat_template=template)
    return Finished(target, before, after)


def split_examples(data: DataTable, *, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """Those to learn from, and those to validate with; an example is never in both.

    Raises:
        ConfigurationError: a file cannot be used, or too few examples are there to hold one out.
    """
    examples = read_examples([Path(file) for file in data.files])
    if data.validation_files:
        validation = read_examples([Path(file) for file in data.validation_files])
        apart = set(validation)
        train = [example for example in examples if example not in apart]
        if not train:
            raise ConfigurationError("every example of data.files is in data.validation_files too")
        return train, validation
    if len(examples) < 2:
        raise ConfigurationError("there is one example; at least two are needed, one of them held out")
    order = np.random.default_rng(seed).permutation(len(examples))
    num_validation = min(max(round(len(examples) * data.validation_share), 1), len(examples) - 1)
    shuffled = [examples[index] for index in order]
    return shuffled[num_validation:], shuffled[:num_validation]


def _read_template(file: str | None) -> str | None:
    try:
        return None if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the chat template {file} cannot be read: {error}") from error


def _encode(encoder: Encoder, examples: Sequence[Example], *, context: int) -> tuple[list[Encoded], int]:
    """(those that fit, how many do not)"""
    encoded = [encoder.encode(example) for example in examples]
    fitting = [one for one in encoded if len(one.token_ids) <= context and any(one.is_answer)]
    return fitting, len(encoded) - len(fitting)


def _make_folder(folder: Path, recipe: TuningRecipe) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_bytes(msgspec.json.format(msgspec.json.encode(recipe)) + b"\n")
        (folder / "best" / "weights.safetensors").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the run folder {folder} cannot be written: {error}") from error


def _describe(run: Tuning, *, num_too_long: int, context: int) -> str:
    moving = sum(parameter.numel() for parameter in moving_weights(run.model).values())
    whole = sum(parameter.numel() for parameter in run.model.parameters())
    left_out = f"; {num_too_long} with more than {context} tokens left out" if num_too_long else ""
    return (
        f"{len(run.train)} examples to learn, {len(run.validation)} to validate{left_out}; {moving / 1e6:.2f}M of "
        f"{whole / 1e6:.2f}M parameters move, {run.device}, {str(run.dtype).removeprefix('torch.')}; {run.steps} steps"
    )


def _publish(run: Tuning, base_folder: Path, *, turn_ends: set[int], chat_template: str | None) -> Path:
    dtype = torch.bfloat16 if run.recipe.run.save_dtype == "bfloat16" else torch.float32
    target, adapter, model = run.folder / _MODEL, run.folder / "adapter", run.model
    if run.recipe.method.kind == "lora":
        write_adapter(model, adapter, turn_ends=turn_ends, chat_template=chat_template)
        if not run.recipe.run.merge:
            return adapter
        model = merged(model)
    assert isinstance(model, PreTrainedModel)
    write_model(model, base_folder, target, dtype=dtype, turn_ends=turn_ends, chat_template=chat_template)
    return target
