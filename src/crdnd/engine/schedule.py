"""The learning rate as a pure function of how much of the run is done, so there is nothing to save or to lose."""

import math

from crdnd.engine.settings import ScheduleSettings


def learning_rate_factor(schedule: ScheduleSettings, progress: float) -> float:
    """What the highest learning rate is multiplied by at `progress` in [0, 1).

    >>> learning_rate_factor(ScheduleSettings(name="cosine"), 0.5)
    0.5
    """
    if progress < schedule.warmup:
        return progress / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        return schedule.factor ** sum(progress >= milestone for milestone in schedule.milestones)
    rest = (progress - schedule.warmup) / (1 - schedule.warmup)
    return (1 + math.cos(math.pi * rest)) / 2
