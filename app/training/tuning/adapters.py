"""Low-rank adapters (Hu et al. 2021) by peft: put beside a model, written, read back, merged into it."""

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from app.core.errors import ConfigurationError
from app.training.errors import TrainingStopped
from app.training.tuning.recipe import MethodTable

_SERVING = "serving.json"
"""Beside the adapter: what a server of the merged model has to know."""


def add_adapters(model: PreTrainedModel, method: MethodTable, *, base: str) -> nn.Module:
    """Freeze the model and put fresh adapters beside every matrix of its layers.

    Args:
        base: what the adapter calls the model that it belongs to.

    Raises:
        ConfigurationError: peft is not there.
    """
    with _peft() as peft:
        config = peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
        )
        adapted = peft.get_peft_model(model, config)
    assert isinstance(adapted, nn.Module)
    return adapted


def open_adapter(model: PreTrainedModel, folder: Path) -> nn.Module:
    """The model with the adapters that `write_adapter` left.

    Raises:
        ConfigurationError: peft is not there, or the folder holds no adapter of this model.
    """
    with _peft() as peft:
        try:
            adapted = peft.PeftModel.from_pretrained(model, folder)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigurationError(f"{folder} holds no adapter of this model: {error}") from error
    assert isinstance(adapted, nn.Module)
    return adapted


def write_adapter(adapted: Any, target: Path, *, turn_ends: Iterable[int], chat_template: str | None) -> None:
    """Write the adapter alone, in peft's format. Raises TrainingStopped where that fails."""
    draft = target.with_name(f".draft-{target.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        adapted.save_pretrained(draft)
        serving = {"turn_ends": sorted(turn_ends), "chat_template": chat_template}
        (draft / _SERVING).write_text(json.dumps(serving, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except OSError as error:
        raise TrainingStopped(f"the adapter cannot be written to {target}: {error}") from error


def read_serving(folder: Path) -> tuple[list[int], str | None]:
    """(turn_ends, chat_template) as `write_adapter` noted them; nothing for an adapter from elsewhere."""
    path = folder / _SERVING
    if not path.is_file():
        return [], None
    serving = json.loads(path.read_text(encoding="utf-8"))
    return serving["turn_ends"], serving["chat_template"]


def merged(adapted: Any) -> PreTrainedModel:
    """The model with its adapters added into its own matrices."""
    model = adapted.merge_and_unload()
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _peft() -> Iterator[ModuleType]:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            f"adapters need peft ({error}); install it with: pip install 'headwater[lora]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads names that transformers is about to drop
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)  # it sets what it asks for
        yield peft
