"""The door for images and labels: checked once, with errors that carry everything."""

import hashlib
import warnings
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from rush.data.images import ImageSet
from rush.data.kind import ANY_KIND, ImageKind
from rush.errors import InputError, RoundingWarning
from rush.runtime.numbers import positive_integer as positive_integer
from rush.runtime.numbers import probability as probability

ROUNDING = 2.0**-21
"""Four steps of float32 above 1 (4.8e-7): normalizing an image and undoing it takes four operations, each of which
rounds a value of at most about 1 by half a step; the rest is margin."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class LabelledPixels:
    """Checked images ``x`` (N, C, H, W) float32 in [0, 1], labels ``y`` (N,) int64 and one ``id`` an image."""

    x: Tensor
    y: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: list[int]) -> "LabelledPixels":
        """The images at these positions."""
        return LabelledPixels(self.x[indices], self.y[indices], tuple(self.ids[i] for i in indices))


Images: TypeAlias = ImageSet | LabelledPixels | tuple[Tensor, Tensor]


def check_pixels(x: Tensor, what: str = "pixels") -> Tensor:
    """``x`` as float32 within [0, 1], apart from autograd; what is outside by rounding is moved to the edge.

    The pixels that come back are those to judge, hash and measure. Warns: RoundingWarning with the number of pixels
    that were moved and the largest excess.
    Raises: InputError unless ``x`` is float (N, C, H, W), N >= 1, finite and, up to that rounding, within [0, 1].
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.dtype not in _FLOATS or x.numel() == 0:
        raise InputError(f"images must be a float tensor (N, C, H, W) with N >= 1, got {_described(x)}")
    pixels = x.detach().float()
    low, high = float(pixels.min()), float(pixels.max())
    rounding = box_rounding(x.dtype)
    if not (low >= -rounding and high <= 1 + rounding):  # written so that NaN fails too
        raise InputError(
            f"{what} must be finite and lie in [0, 1], got minimum {low!r} and maximum {high!r} (up to {rounding:.2g} "
            "outside is taken for rounding); divide uint8 images by 255 and move normalization into the model"
        )
    if low >= 0 and high <= 1:
        return pixels
    moved = int(((pixels < 0) | (pixels > 1)).sum())
    warnings.warn(
        f"{moved} of {pixels.numel()} {what} lay up to {max(-low, high - 1):.2g} outside [0, 1], which is rounding, "
        "and were moved to its edge",
        RoundingWarning,
        stacklevel=3,
    )
    return pixels.clamp(0, 1)


def box_rounding(dtype: torch.dtype) -> float:
    """How far outside [0, 1] a pixel of this type may lie by rounding: ``ROUNDING``, or one step of a coarser type
    above 1."""
    return max(ROUNDING, torch.finfo(dtype).eps)


def check_labels(y: Tensor, num_images: int, num_classes: int | None = None) -> None:
    """Raises InputError unless ``y`` is integer (num_images,) with values 0 .. num_classes - 1."""
    if not isinstance(y, Tensor) or y.shape != (num_images,) or y.dtype not in _INTEGERS:
        raise InputError(
            f"labels must be an integer tensor of shape ({num_images},), class indices from 0, got {_described(y)}; "
            "give e.g. torch.as_tensor(labels) of whole numbers, and .long() for those stored as floats"
        )
    y = y.long()
    if int(y.min()) < 0 or (num_classes is not None and int(y.max()) >= num_classes):
        allowed = "at least 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise InputError(f"labels must be {allowed}, got {int(y.min())} to {int(y.max())}")


def labelled_pixels(images: Images, num_classes: int | None = None, kind: ImageKind = ANY_KIND) -> LabelledPixels:
    """``images`` as checked pixels, labels and ids; a pair of tensors gets ids from a hash of the pixels.

    kind: what the model takes, where it is known; the class names of a pair are not.
    Raises: InputError for anything but an ImageSet with labels or a pair (float images in [0, 1], labels), and for
    images of another kind.
    """
    if isinstance(images, LabelledPixels):
        found = images
    elif isinstance(images, ImageSet):
        if images.labels is None:
            raise InputError(f"{images.name} ({images.split}) has no labels; certification and attacks need them")
        kind.check_shape(images.shape, f"the images of {images.name} ({images.split})", "those of the model")
        kind.check_classes(images.classes, f"the images of {images.name} ({images.split})", "the model")
        found = LabelledPixels(images.pixels(), images.labels, tuple(str(i) for i in images.ids))
    elif isinstance(images, tuple) and len(images) == 2:
        x = check_pixels(images[0]).cpu()
        check_labels(images[1], len(x))
        found = LabelledPixels(x, images[1].long().cpu(), pixel_ids(x))
    else:
        raise InputError(f"images must be an ImageSet or a pair (float images, labels), got {type(images).__name__}")
    kind.check_shape(tuple(found.x.shape[1:]), "the images", "those of the model")
    check_labels(found.y, len(found), num_classes)
    return found


def kind_of(model: object) -> ImageKind:
    """The kind of images that ``model`` is known to take: a smoothed classifier's or a run's, of others nothing."""
    kind = getattr(model, "kind", None)
    return kind if isinstance(kind, ImageKind) else ANY_KIND


def pixel_ids(x: Tensor) -> tuple[str, ...]:
    """An id per image of ``x`` (N, C, H, W): SHA-256 of shape and float32 pixels, 32 hex digits."""
    return tuple(
        hashlib.sha256(
            repr(tuple(image.shape)).encode() + image.float().cpu().contiguous().numpy().tobytes()
        ).hexdigest()[:32]
        for image in x.detach()
    )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array, {value.dtype} of shape {value.shape}: take torch.from_numpy"
    return type(value).__name__
