"""The kind of images that a model takes or a data set holds, held against another one."""

from dataclasses import dataclass
from itertools import zip_longest

from rush.errors import InputError
from rush.runtime.numbers import as_whole

Shape = tuple[int, int, int]
_LISTED = 30  # class names, beyond which an error shows the first difference alone


@dataclass(frozen=True)
class ImageKind:
    """shape: (channels, height, width) of every image. classes: names in the order of their labels. None: not known."""

    shape: Shape | None = None
    classes: tuple[str, ...] | None = None

    def check_shape(self, shape: tuple[int, ...], what: str, against: str) -> None:
        """Raise InputError when ``shape`` (C, H, W), that of the images ``what``, is not the one of ``against``."""
        if self.shape is None or tuple(shape) == self.shape:
            return
        raise InputError(
            f"{what} are {shape_text(shape)} (channels x height x width), {against} {shape_text(self.shape)}; "
            "convert them first (size: rush.load_images(..., size=...); channels: repeat grey ones, average colours)"
        )

    def check_classes(self, classes: tuple[str, ...], what: str, against: str) -> None:
        """Raise InputError unless ``classes``, those of ``what``, are these ones or their beginning, in the same
        order.

        The beginning suffices: a data set whose last classes have no image gives every label the same meaning.
        """
        if self.classes is None or tuple(classes) == self.classes[: len(classes)]:
            return
        raise InputError(f"{what} have other classes than {against}: {_difference(tuple(classes), self.classes)}")


ANY_KIND = ImageKind()


def checked_shape(shape: object) -> Shape:
    """``shape`` as three plain integers >= 1. Raises: InputError for anything else."""
    sides = tuple(map(as_whole, shape)) if isinstance(shape, tuple | list) else ()
    if len(sides) != 3 or any(side is None or side < 1 for side in sides):
        raise InputError(f"image_shape must be (channels, height, width), three integers >= 1, got {shape!r}")
    return sides  # type: ignore[return-value]


def shape_text(shape: tuple[int, ...]) -> str:
    """``3x32x32``."""
    return "x".join(map(str, shape))


def _difference(given: tuple[str, ...], known: tuple[str, ...]) -> str:
    """Both lists of names, or the first difference of long ones, and what to do."""
    order = "in another order" if sorted(given) == sorted(known) else f"{len(given)} and {len(known)} classes"
    if max(len(given), len(known)) <= _LISTED:
        lists = f"{', '.join(given)} against {', '.join(known)}"
    else:
        first, pair = next((label, pair) for label, pair in enumerate(zip_longest(given, known)) if pair[0] != pair[1])
        lists = f"the first difference is label {first}, {pair[0]!r} against {pair[1]!r}"
    return f"{lists} ({order}); give images whose labels mean the same, in the same order"
