"""What ends a training run early."""

from app.core.errors import HeadwaterError


class TrainingStopped(HeadwaterError):
    """The run cannot go on, though its settings were fine; says what is kept and how to go on."""
