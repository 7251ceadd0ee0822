"""The learning rate as a function of the step."""

import math

from app.training.recipe import ScheduleTable


def learning_rate(schedule: ScheduleTable, step: int, *, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`."""
    peak, last = schedule.learning_rate, schedule.learning_rate * schedule.last_share
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        done = (step - schedule.warmup_steps) / max(steps - 1 - schedule.warmup_steps, 1)
        return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    left = steps - 1 - step
    if left >= schedule.decay_steps:
        return peak
    return last + (peak - last) * left / schedule.decay_steps
