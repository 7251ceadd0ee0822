"""What tokens weigh in a nucleus. Bit for bit `sampling.weights`, of whose operations none may be fused."""

import torch

from app.runner.sampling.weights import COEFFICIENTS, GRAIN, LOG2_E, LOWEST_POWER


def weights_of(scores: torch.Tensor) -> torch.Tensor:
    """Of float32 scores <= 0, the same shape. A float of Python is rounded to float32, which its constants are."""
    power = (scores * float(LOG2_E)).clamp(min=float(LOWEST_POWER))
    whole = power.round()  # to even, as numpy's rint
    power = power - whole
    weights = torch.full_like(power, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        weights = weights * power
        weights = weights + coefficient
    weights = weights * ((whole.int() + 127) << 23).view(torch.float32)
    grain = float(GRAIN)
    return torch.where(weights < grain, (weights + grain) - grain, weights)
