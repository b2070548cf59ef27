"""The errors and warnings a user can meet: every one says what was given, what is allowed and what to do."""


class RushError(Exception):
    """Base of all errors that this library raises on purpose."""


class ConfigError(RushError, ValueError):
    """A recipe, an override or an option is not allowed."""


class DataError(RushError, ValueError):
    """A data set is missing, damaged, empty or not what it should be; the text names the file and the remedy."""


class InputError(RushError, ValueError):
    """An argument of a library call (images, labels, numbers) is out of its range or has the wrong shape."""


class ModelError(RushError, ValueError):
    """A classifier cannot be smoothed, certified or attacked as it is."""


class RunError(RushError):
    """A run folder does not hold what a stage needs, or holds something that would be overwritten."""


class WriteError(RunError, OSError):
    """A file cannot be written: the disk is full or read-only, or writing is not allowed; ``reason`` says which."""

    def __init__(self, path: object, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{path} cannot be written: {reason}. What is finished is kept: free space or allow writing there, and the "
            "same command resumes"
        )


class CheckpointError(RushError):
    """A checkpoint cannot be read or does not belong to this run."""


class Interrupted(RushError):
    """The process was asked to stop and has kept its work; ``status`` is what it exits with."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class DeviceMemoryError(RushError, MemoryError):
    """The device has not enough memory; the text names the field of the recipe to lower."""


class SandwichError(RushError):
    """Attacks broke more certified images than the stated levels allow: the certificate or the attack is wrong."""


class RushWarning(UserWarning):
    """Base of all warnings that this library gives on purpose."""


class DataWarning(RushWarning):
    """Something in a folder of images is not read; the text says what, how many and where the first is."""


class CopiesWarning(RushWarning):
    """Some images are copies of others, pixel by pixel, and are counted once; the text says how many."""


class NumericsWarning(RushWarning):
    """A result may differ in its last bits from one call, batch or machine to another."""


class RoundingWarning(RushWarning):
    """Pixels left [0, 1], or points their ball, by no more than rounding, and were moved back before anything else."""
