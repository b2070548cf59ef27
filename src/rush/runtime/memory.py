"""Out-of-memory errors, reported in one line that names the recipe field to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rush.errors import DeviceMemoryError
from rush.runtime.lines import one_line

JUDGED = "execution.tile (the images of a forward pass)"
"""The field to lower where samples are judged or attacked."""
_MESSAGES = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # of allocators that raise a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` reports a failed memory allocation in torch or one of its libraries."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def memory_error(what: str, remedy: str, error: BaseException) -> DeviceMemoryError:
    """Return the error for ``what`` having run out of memory, with the fields ``remedy`` to lower."""
    cause = ". ".join(one_line(error).split(". ")[:2]).rstrip(".")
    return DeviceMemoryError(
        f"{what}: there is not enough memory ({cause}). Lower {remedy} in a run of its own (another --out), or free "
        "memory on the device: the same command then resumes. Finished work is kept"
    )


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors within the context into a DeviceMemoryError that names ``remedy``.

    Args:
        what: the work that is done, e.g. a stage.
        remedy: the field or fields of a recipe that determine how much memory the work takes.

    Raises:
        DeviceMemoryError: Memory cannot be allocated.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise memory_error(what, remedy, error) from error
