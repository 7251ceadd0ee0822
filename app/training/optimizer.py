"""AdamW with decay on matrices alone, or Muon for the hidden matrices beside it; state as plain named tensors.

Muon (Jordan et al. 2024, as torch has it) makes the momentum of a matrix orthogonal before it is added. With its steps
scaled to the size of AdamW's (Liu et al. 2025), one learning rate and one decay serve both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from app.training.recipe import TrainTable

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
SCALE = "scale"
"""Of a group of parameters: what its learning rate is multiplied by; 1 where it is missing."""
_HAS_STEP = "exp_avg"
"""What AdamW keeps beside a count of steps; Muon keeps none."""


class Optimizer:
    """One or two optimisers of torch that share a learning rate; each parameter belongs to one of them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        self.rate = 0.0
        """The learning rate of the last `step`, unscaled."""

    def step(self, rate: float) -> None:
        """Move the parameters by their gradients, then forget these."""
        self.rate = rate
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group.get(SCALE, 1.0)
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The moments by parameter name; empty before the first step."""
        return {
            f"{moment}.{name}": part.state[parameter][moment]
            for name, parameter in model.named_parameters()
            for part in self.parts
            if parameter in part.state
            for moment in _MOMENTS
            if moment in part.state[parameter]
        }

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], *, step: int) -> None:
        """Put back what `tensors` gave after `step` steps."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        for part in self.parts:
            for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
                name = names[parameter]
                kept = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS if f"{moment}.{name}" in tensors}
                state = {moment: tensor.to(parameter.device) for moment, tensor in kept.items()}
                if _HAS_STEP in state:
                    state["step"] = torch.tensor(float(step))
                if state:
                    part.state[parameter] = state


def make_optimizer(model: nn.Module, train: TrainTable) -> Optimizer:
    """By the recipe. Norms, biases and other vectors do not decay; embeddings are AdamW's in either case."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = [parameter for parameter in _hidden_matrices(model) if parameter.requires_grad]
    if train.optimizer == "adamw" or not hidden:
        return Optimizer([_adamw(parameters, train)])
    known = set(map(id, hidden))
    rate, decay = train.schedule.learning_rate, train.weight_decay
    muon = torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Optimizer([_adamw([one for one in parameters if id(one) not in known], train), muon])


def _adamw(parameters: Sequence[nn.Parameter], train: TrainTable) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.schedule.learning_rate, betas=train.betas)


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [parameter for parameter in model.parameters() if parameter.ndim == 2 and id(parameter) not in embeddings]
