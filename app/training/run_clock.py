"""How far a run in progress is: its steps, its time, and whether it is to end."""

import time
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RunClock:
    """What every kind of run counts; see `app.training.run` and `app.training.tuning.run`."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Of training before this process."""
    is_stopping: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all processes of the run."""
        return self.seconds + time.monotonic() - self.started

    def stop(self) -> None:
        """End after the step at hand."""
        self.is_stopping = True
