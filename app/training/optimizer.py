"""AdamW with decay on matrices alone, and its state as plain named tensors."""

import torch
from torch import Tensor, nn

from app.training.recipe import TrainTable

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, train: TrainTable) -> torch.optim.AdamW:
    """Norms, biases and other vectors do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.schedule.learning_rate, betas=train.betas)


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The moments by parameter name; empty before the first step."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def restore_optimizer(optimizer: torch.optim.AdamW, model: nn.Module, tensors: dict[str, Tensor], *, step: int) -> None:
    """Put back what `optimizer_tensors` gave after `step` steps."""
    if not tensors:
        return
    for name, parameter in model.named_parameters():
        moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
