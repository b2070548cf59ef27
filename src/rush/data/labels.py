"""Validation of labels, class names and ids as files store them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from rush.errors import DataError

MAX_CLASSES = 100_000
"""Largest number of classes of a data set or a model."""
_TEXT_REMEDY = "store the class index of each image, and the names as the classes"
_REMEDIES = {
    "f": "convert whole numbers with labels.astype(int)",
    "b": "store 0 and 1 as integers with labels.astype(int)",
    **dict.fromkeys("USO", _TEXT_REMEDY),
}


def check_labels(labels: np.ndarray, num_images: int, num_classes: int, where: str) -> torch.Tensor:
    """Return ``labels`` as int64 (N,).

    Args:
        labels: as stored. Integers of any width are allowed. Text, booleans and floating-point numbers are not, even
            whole ones.
        num_images: N.
        num_classes: number of classes. Labels are 0..num_classes - 1.
        where: name of the file for error messages.

    Raises:
        DataError: ``labels`` are not N integers in 0..num_classes - 1.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        one_hot = labels.ndim == 2 and labels.dtype.kind not in "USO"
        remedy = "take labels.argmax(axis=1) of one-hot rows" if one_hot else _REMEDIES.get(labels.dtype.kind)
        raise DataError(
            f"{where}: labels must be integers of shape (N,), got {labels.dtype} {labels.shape}; "
            f"{remedy or 'store one class index per image'}"
        )
    if len(labels) != num_images:
        raise DataError(f"{where}: {len(labels)} labels for {num_images} images; store exactly one label per image")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DataError(
            f"{where}: row {wrong[0]} has label {labels[wrong[0]]}, allowed are 0..{num_classes - 1}; "
            f"{wrong.size} of {num_images} labels are out of range: correct them, name every class, or drop the labels"
        )
    return torch.from_numpy(labels.astype(np.int64))


def label_bytes(labels: torch.Tensor | None) -> bytes:
    """Return the bytes that stand for ``labels`` (N,) in a fingerprint, the same on every machine."""
    return b"unlabelled" if labels is None else labels.numpy().astype("<i8").tobytes()


def number_classes(parts: Sequence[np.ndarray], where: str) -> tuple[str, ...]:
    """Return the classes of a set that names none: "0".."K-1", where K - 1 is the largest integer label in ``parts``.

    Raises:
        DataError: there would be more than ``MAX_CLASSES``, or all labels are the same.
    """
    integers = [part for part in parts if part.dtype.kind in "iu" and part.size]
    largest = max((int(part.max()) for part in integers), default=-1)
    if largest >= MAX_CLASSES:
        raise DataError(
            f"{where}: label {largest} implies {largest + 1} classes, at most {MAX_CLASSES} are allowed; number the "
            "classes 0, 1, 2, ..."
        )
    if largest >= 0 and min(int(part.min()) for part in integers) == largest:
        raise _single_class(where, sum(part.size for part in integers), str(largest))
    return tuple(str(label) for label in range(largest + 1))


def check_class_names(names: object, where: str) -> tuple[str, ...]:
    """Return ``names`` as a tuple, each without a leading byte order mark.

    Raises:
        DataError: they are not a list or tuple of at most ``MAX_CLASSES`` distinct, non-empty strings.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: class names must be a list of strings, got {_describe(names)}; store one per class")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{where}: {len(names)} class names, at most {MAX_CLASSES} are allowed; correct the list")
    plain = tuple(name.removeprefix("\ufeff") for name in names)
    wrong = [name for name, count in Counter(plain).items() if count > 1 or name == ""]
    if wrong:
        raise DataError(f"{where}: class name {wrong[0][:100]!r} is empty or a duplicate; name every class once")
    return plain


def check_several_classes(labels: torch.Tensor | None, classes: Sequence[str], split: str, where: str) -> None:
    """Raise DataError for a set of one class, and for a training split whose images are all of one class.

    Other splits may lack classes of the set.
    """
    if labels is None:
        return
    present = labels.unique()
    if len(classes) < 2 or (len(present) < 2 and "train" in split.split("+")):
        raise _single_class(where, len(labels), classes[int(present[0])])


def decode_texts(values: np.ndarray, what: str, where: str) -> list[str]:
    """Return ``values`` (N,) as strings: bytes decoded as UTF-8, integers in decimal, no leading byte order mark.

    Args:
        values: array of text, bytes or integers.
        what: name of the values for error messages.
        where: name of the file for error messages.

    Raises:
        DataError: ``values`` are of a different kind or shape, or not UTF-8.
    """
    if values.ndim != 1 or values.dtype.kind not in "USiu":
        raise DataError(
            f"{where}: {what} must be text or integers of shape (N,), got {values.dtype} {values.shape}; store one per "
            "entry"
        )
    try:
        texts = [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in values.tolist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {what} are bytes that are not UTF-8 ({error}); store them as text") from error
    return [text.removeprefix("\ufeff") for text in texts]


def _single_class(where: str, num_images: int, name: str) -> DataError:
    return DataError(
        f"{where}: all {num_images} images have the class {name!r}; a classifier needs at least two: add images of "
        "another class, or drop the labels"
    )


def _describe(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"a list that contains {next(type(item).__name__ for item in value if not isinstance(item, str))}"
    return type(value).__name__
