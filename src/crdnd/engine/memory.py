"""What memory that runs out looks like."""

import torch

from crdnd.errors import RunError


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the processor has no memory left; torch has no type of its own for the latter."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return not isinstance(error, RunError) and any(text in str(error) for text in texts)
