"""The waiting queue, sequences and step plans. Pure Python: it sees no tensor and imports no torch."""

from app.scheduler.config import SchedulerConfig
from app.scheduler.scheduler import Scheduler, SchedulerCounts

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerCounts"]
