"""Which parameters a run moves, and how fast each: by depth, as Howard and Ruder (2018) fine-tune."""

import re
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from app.core.errors import ConfigurationError
from app.training.optimizer import SCALE, Optimizer
from app.training.tuning.adapters import add_adapters
from app.training.tuning.recipe import MethodTable, TrainTable

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
"""As transformers names the layers of its decoders."""


def choose_parameters(model: PreTrainedModel, method: MethodTable, *, base: str) -> nn.Module:
    """Freeze what does not move; for lora, put adapters beside every matrix of the layers.

    Args:
        base: what an adapter calls the model that it belongs to.

    Raises:
        ConfigurationError: the model has fewer layers, or peft is not there.
    """
    if method.kind == "lora":
        return add_adapters(model, method, base=base)
    if method.kind == "last_layers":
        assert method.layers is not None
        num_layers = count_layers(model)
        if method.layers > num_layers:
            raise ConfigurationError(f"method.layers {method.layers} is more than the model's {num_layers}")
        embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        for name, parameter in model.named_parameters():
            is_high = _layer_of(name, num_layers=num_layers) >= num_layers - method.layers
            parameter.requires_grad_(is_high and id(parameter) not in embeddings)
    return model


def count_layers(model: nn.Module) -> int:
    """Raises ConfigurationError where the names of the parameters show no layers."""
    found = [int(match[1]) for name, _ in model.named_parameters() if (match := _LAYER.search(name))]
    if not found:
        raise ConfigurationError("the model's parameters are not named by layers; use method.kind whole")
    return max(found) + 1


def make_tuner(model: nn.Module, train: TrainTable) -> Optimizer:
    """AdamW with decay on matrices alone; `SCALE` of each group falls with depth."""
    num_layers = count_layers(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            below = num_layers - max(_layer_of(name, num_layers=num_layers), -1)
            groups.setdefault((below, parameter.ndim >= 2), []).append(parameter)
    return Optimizer(
        [
            torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "weight_decay": train.weight_decay if is_matrix else 0.0,
                        SCALE: train.depth_decay ** max(below - 1, 0),
                    }
                    for (below, is_matrix), parameters in sorted(groups.items())
                ],
                lr=train.learning_rate,
            )
        ]
    )


def moving_weights(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """What the run changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _layer_of(name: str, *, num_layers: int) -> int:
    """-1 for embeddings, num_layers for the final norm and the head."""
    match = _LAYER.search(name)
    if match:
        return int(match[1])
    return -1 if re.search(r"embed|wte|wpe", name) else num_layers
