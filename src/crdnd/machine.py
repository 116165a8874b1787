"""What this process may use of its machine."""

import os


def cores() -> int:
    """Processor cores; fewer than the machine has where a scheduler or a container gives a share."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
