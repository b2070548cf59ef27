"""Memory that the C library keeps for reuse, and out-of-memory errors that name the recipe field to lower."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rush.errors import DeviceMemoryError
from rush.runtime.lines import one_line

JUDGED = "execution.tile (the images of a forward pass)"
"""The field to lower where samples are judged or attacked."""
_MESSAGES = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # of allocators that raise a RuntimeError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)


def keep_freed_memory() -> None:
    """Make the C library of this process keep the memory of freed tensors for the next ones.

    By default glibc returns every large block to the system, which clears each page of the next block on its first use.
    Where activations take megabytes this is a large part of a forward pass. Peak memory is about the same, and memory
    once used is given back when the process ends. Nothing is set where the C library has no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**30)


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
