"""The whole of `headwater finetune`: recipe → examples, model and run → folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from app.core.errors import ConfigurationError
from app.training.tuning.adapters import merged, write_adapter
from app.training.tuning.encoding import Encoded, Encoder
from app.training.tuning.examples import Example, read_examples
from app.training.tuning.methods import choose_parameters, moving_weights
from app.training.tuning.publish import end_ids, open_base, require_apart, write_model
from app.training.tuning.recipe import DataTable, TuningRecipe
from app.training.tuning.run import Score, Tuning, inputs_digest, open_tuning
from app.training.tuning.tune import require_some, tune

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


@dataclass(frozen=True)
class Opened:
    """A run that can start, and what its model is written with."""

    run: Tuning
    base_folder: Path
    encoder: Encoder
    chat_template: str | None
    """In place of the base's own."""
    description: str


def finetune(recipe: TuningRecipe, *, find_model: FindModel) -> Finished:
    """Learn, from the run folder's last checkpoint if it has one, and write what was learnt.

    Raises:
        ConfigurationError: the recipe, its examples, the model and what is in the run folder do not fit.
        TrainingStopped: the loss is no number, or a file cannot be written.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    opened = open_finetuning(recipe, find_model=find_model)
    before, after = tune(opened.run, description=opened.description)
    return Finished(_publish(opened), before, after)


def open_finetuning(recipe: TuningRecipe, *, find_model: FindModel) -> Opened:
    """Read the examples and the model, choose what moves, and put back the last checkpoint.

    Raises:
        ConfigurationError: the recipe, its examples, the model and what is in the run folder do not fit.
    """
    splits = split_examples(recipe.data, seed=recipe.train.seed)
    base_folder = find_model(recipe.model)
    require_apart(base_folder, Path(recipe.run.folder) / _MODEL)
    base, tokenizer = open_base(base_folder)
    template = _read_template(recipe.data.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    ends = end_ids(base_folder, base.config.to_dict())
    encoder = Encoder(tokenizer, end_id=ends[0])
    context = min(recipe.data.context, base.config.max_position_embeddings)
    (train, num_long), (validation, num_long_too) = (_encode(encoder, split, context=context) for split in splits)
    for what, encoded in (("training", train), ("validation", validation)):
        require_some(encoded, context=context, what=what)
    inputs_sha256 = inputs_digest(base, train, validation)
    torch.manual_seed(recipe.train.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = choose_parameters(base, recipe.method, base=recipe.model).to(device).train()
    run = open_tuning(recipe, model, train=train, validation=validation, inputs_sha256=inputs_sha256, device=device)
    return Opened(
        run=run,
        base_folder=base_folder,
        encoder=encoder,
        chat_template=template,
        description=_describe(run, num_too_long=num_long + num_long_too, context=context),
    )


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


def _describe(run: Tuning, *, num_too_long: int, context: int) -> str:
    moving = sum(parameter.numel() for parameter in moving_weights(run.model).values())
    whole = sum(parameter.numel() for parameter in run.model.parameters())
    left_out = f"; {num_too_long} with more than {context} tokens left out" if num_too_long else ""
    dtype = str(run.dtype).removeprefix("torch.")
    return (
        f"{len(run.train)} examples to learn, {len(run.validation)} to validate{left_out}; {moving / 1e6:.2f}M of "
        f"{whole / 1e6:.2f}M parameters move, {run.device}, {dtype}; {run.steps} steps, from step {run.step}"
    )


def _publish(opened: Opened) -> Path:
    run, turn_ends, template = opened.run, opened.encoder.turn_ends, opened.chat_template
    dtype = torch.bfloat16 if run.recipe.run.save_dtype == "bfloat16" else torch.float32
    target, adapter, model = run.folder / _MODEL, run.folder / "adapter", run.model
    if run.recipe.method.kind == "lora":
        write_adapter(model, adapter, turn_ends=turn_ends, chat_template=template)
        if not run.recipe.run.merge:
            return adapter
        model = merged(model)
    assert isinstance(model, PreTrainedModel)
    write_model(model, opened.base_folder, target, dtype=dtype, turn_ends=turn_ends, chat_template=template)
    return target
