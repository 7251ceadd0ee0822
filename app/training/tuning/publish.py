"""What a run leaves: a folder that `headwater serve` takes, an adapter, or the two made one."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from app.core.errors import ConfigurationError
from app.training.errors import TrainingStopped
from app.training.tuning.adapters import merged, open_adapter, read_serving

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = frozenset(["config.json", "generation_config.json", "headwater.json", "model.safetensors.index.json"])


def open_base(folder: Path) -> tuple[PreTrainedModel, Any]:
    """The model in float32 and transformers' tokenizer for it.

    Raises:
        ConfigurationError: it is quantised, transformers does not know it, or its tokenizer has ids that it lacks.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            raise ConfigurationError(f"{folder} is quantised; fine-tune the model that it was made from")
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{folder} holds no decoder that transformers can open: {error}") from error
    num_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ConfigurationError(
            f"the tokenizer of {folder} has {len(tokenizer)} ids and the model {num_rows}: they do not belong together"
        )
    return model, tokenizer


def write_model(
    model: PreTrainedModel,
    base: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    turn_ends: Iterable[int] = (),
    chat_template: str | None = None,
) -> None:
    """Write weights and what belongs to them; the folder appears whole, in place of one that was there.

    Args:
        base: folder of the model that this one was; its configuration and tokenizer stay.
        turn_ends: token ids that a server must stop at too.
        chat_template: in place of that of `base`.

    Raises:
        TrainingStopped: it cannot be written.
    """
    draft = target.with_name(f".draft-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        with _no_bars():
            model.to(dtype).save_pretrained(draft)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config.pop("dtype", None)
        _write_json(draft / "config.json", config | {"torch_dtype": str(dtype).removeprefix("torch.")})
        _write_json(draft / "generation_config.json", _generation(base, config, turn_ends=turn_ends))
        for file in (file for pattern in _COPIED for file in base.glob(pattern) if file.name not in _NOT_COPIED):
            shutil.copyfile(file, draft / file.name)
        if chat_template is not None:
            (draft / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise TrainingStopped(f"the model cannot be written to {target}: {error}") from error


def merge_adapter(adapter: Path, base: Path, target: Path) -> None:
    """Write the model that `base` and the adapter make together, in the type of `base`.

    Raises:
        ConfigurationError: the adapter is none, or belongs to another model, or `target` is `base`.
        TrainingStopped: the model cannot be written.
    """
    require_apart(base, target)
    model, _ = open_base(base)
    adapted = open_adapter(model, adapter)
    name = json.loads((base / "config.json").read_text(encoding="utf-8")).get("torch_dtype", "bfloat16")
    turn_ends, template = read_serving(adapter)
    dtype = getattr(torch, name)
    write_model(merged(adapted), base, target, dtype=dtype, turn_ends=turn_ends, chat_template=template)


def require_apart(base: Path, target: Path) -> None:
    """Raise ConfigurationError where a model would be written over the one that it comes from."""
    if target.resolve() == base.resolve():
        raise ConfigurationError(f"{target} is the model that this one would be made from; name another folder")


def end_ids(folder: Path, config: Any) -> list[int]:
    """The tokens that end a text, most general first: of generation_config.json, else of the configuration."""
    value = _read_generation(folder).get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        raise ConfigurationError(f"{folder} names no eos_token_id in config.json or generation_config.json")
    return [value] if isinstance(value, int) else list(value)


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar of its own for each file."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _generation(base: Path, config: Any, *, turn_ends: Iterable[int]) -> dict[str, Any]:
    ids = end_ids(base, config)
    return {**_read_generation(base), "eos_token_id": [*ids, *sorted(set(turn_ends) - set(ids))]}


def _read_generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
