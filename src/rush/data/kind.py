"""Kinds of images: the shape and the class names that a model takes or a data set holds."""

from dataclasses import dataclass
from itertools import zip_longest

from rush.errors import InputError
from rush.runtime.numbers import as_whole

Shape = tuple[int, int, int]
_LISTED = 30  # largest number of class names that an error lists in full


@dataclass(frozen=True)
class ImageKind:
    """The known properties of images: a property is None where it is unknown.

    shape: (channels, height, width) of every image. classes: names in the order of their labels.
    """

    shape: Shape | None = None
    classes: tuple[str, ...] | None = None

    def check_shape(self, shape: tuple[int, ...], what: str, against: str) -> None:
        """Raise InputError if ``shape`` (C, H, W) differs from this kind's.

        ``what`` names the images and ``against`` the owner of this kind in the error message.
        """
        if self.shape is None or tuple(shape) == self.shape:
            return
        raise InputError(
            f"{what} are {shape_text(shape)} (channels x height x width), {against} {shape_text(self.shape)}; "
            "convert them first (size: rush.load_images(..., size=...); channels: repeat grey ones, average colours)"
        )

    def check_classes(self, classes: tuple[str, ...], what: str, against: str) -> None:
        """Raise InputError unless ``classes`` are the first classes of this kind, in the same order.

        A data set whose last classes have no image gives every label the same meaning. ``what`` and ``against`` are as
        in ``check_shape``.
        """
        if self.classes is None or tuple(classes) == self.classes[: len(classes)]:
            return
        raise InputError(f"{what} have different classes from {against}: {_difference(tuple(classes), self.classes)}")


ANY_KIND = ImageKind()


def checked_shape(shape: object) -> Shape:
    """Return ``shape`` as three plain integers >= 1, or raise InputError for anything else."""
    sides = tuple(map(as_whole, shape)) if isinstance(shape, tuple | list) else ()
    if len(sides) != 3 or any(side is None or side < 1 for side in sides):
        raise InputError(f"image_shape must be (channels, height, width), three integers >= 1, got {shape!r}")
    return sides  # type: ignore[return-value]


def shape_text(shape: tuple[int, ...]) -> str:
    """Return ``shape`` as text, e.g. "3x32x32"."""
    return "x".join(map(str, shape))


def _difference(classes: tuple[str, ...], expected: tuple[str, ...]) -> str:
    """Return both lists of names, or the first difference of long ones, and the remedy."""
    lengths = f"{len(classes)} and {len(expected)} classes"
    order = "in a different order" if sorted(classes) == sorted(expected) else lengths
    if max(len(classes), len(expected)) <= _LISTED:
        lists = f"{', '.join(classes)} against {', '.join(expected)}"
    else:
        pairs = enumerate(zip_longest(classes, expected))
        label, (name, expected_name) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        lists = f"the first difference is label {label}, {name!r} against {expected_name!r}"
    return f"{lists} ({order}); give images whose labels mean the same, in the same order"
