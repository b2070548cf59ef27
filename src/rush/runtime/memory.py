"""A device that is out of memory, as one line that names what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rush.errors import DeviceMemoryError
from rush.runtime.lines import one_line

JUDGED = "execution.tile (the images of a forward pass)"
"""What to lower where samples are judged or attacked."""
_SAID = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # by the allocators that raise a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch or one of its libraries says by ``error`` that it could not allocate memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def memory_error(what: str, remedy: str, error: BaseException) -> DeviceMemoryError:
    """Return the error that says that ``what`` found too little memory, and to lower ``remedy``."""
    said = ". ".join(one_line(error).split(". ")[:2]).rstrip(".")
    return DeviceMemoryError(
        f"{what}: there is not enough memory ({said}). Lower {remedy} in a run of its own (another --out), or free "
        "memory on the device: the same command then resumes. What is finished is kept"
    )


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Within the context, an error of memory that does not say what to lower says so.

    Args:
        what: what is done, e.g. a stage.
        remedy: the field or fields of a recipe that decide how much memory it takes.

    Raises:
        DeviceMemoryError: if memory cannot be allocated.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise memory_error(what, remedy, error) from error
