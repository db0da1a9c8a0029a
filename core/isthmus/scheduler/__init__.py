"""Which spans run next: requests in, step plans out, results back.  No torch, no text."""

from isthmus.scheduler.limits import SchedulerLimits
from isthmus.scheduler.scheduler import Scheduler
from isthmus.scheduler.stats import SchedulerStats

__all__ = ["Scheduler", "SchedulerLimits", "SchedulerStats"]
