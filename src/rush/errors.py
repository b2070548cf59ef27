"""Errors and warnings for users. Every message states what was given, what is allowed and what to do."""


class RushError(Exception):
    """Base class of all errors that this library raises on purpose."""


class ConfigError(RushError, ValueError):
    """A recipe, an override or an option is not allowed."""


class DataError(RushError, ValueError):
    """A data set is missing, damaged, empty or invalid. The message names the file and the remedy."""


class InputError(RushError, ValueError):
    """An argument of a library call (images, labels, numbers) is out of its range or has the wrong shape."""


class ModelError(RushError, ValueError):
    """A classifier cannot be smoothed, certified or attacked as it is."""


class RunError(RushError):
    """A run folder does not hold what a stage needs, or holds something that would be overwritten."""


class WriteError(RunError, OSError):
    """A file cannot be written. ``reason`` says why, e.g. a full disk or a missing permission."""

    def __init__(self, path: object, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{path} cannot be written: {reason}. Finished work is kept: free space or allow writing there, and the "
            "same command resumes"
        )


class CheckpointError(RushError):
    """A checkpoint cannot be read or does not belong to this run."""


class Interrupted(RushError):
    """The process was asked to stop and has saved its work. ``status`` is its exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class DeviceMemoryError(RushError, MemoryError):
    """The device ran out of memory. The message names the field of the recipe to lower."""


class MissingExtraError(RushError, ImportError):
    """A package that only some users need is not installed. The message names it."""


class SandwichError(RushError):
    """Attacks broke more certified images than the stated levels allow: the certificate or the attack is wrong."""


class RushWarning(UserWarning):
    """Base class of all warnings that this library gives on purpose."""


class DataWarning(RushWarning):
    """Some files in a folder of images are not read. The message gives their kind and number, and names the first."""


class CopiesWarning(RushWarning):
    """Some images are exact duplicates and are counted once. The message gives their number."""


class NumericsWarning(RushWarning):
    """A result may differ in its last bits from one call, batch or machine to another."""


class RoundingWarning(RushWarning):
    """Pixels were outside [0, 1], or points outside their ball, by no more than rounding, and were moved back."""
