"""Validation of images and labels, once, where they enter the library."""

import hashlib
import warnings
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from rush.data.images import ImageSet, as_pixels
from rush.data.kind import ANY_KIND, ImageKind
from rush.errors import InputError, RoundingWarning

ROUNDING = 2.0**-21
"""Largest distance from [0, 1] that counts as rounding: four steps of float32 above 1 (4.8e-7).

Normalizing an image and undoing it takes four operations, each of which rounds a value of at most about 1 by half a
step. The rest is margin.
"""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class LabelledPixels:
    """Validated images ``x`` (N, C, H, W) float32 in [0, 1], labels ``y`` (N,) int64 and one id per image."""

    x: Tensor
    y: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: list[int]) -> "LabelledPixels":
        """Return the images at these positions."""
        return LabelledPixels(self.x[indices], self.y[indices], tuple(self.ids[i] for i in indices))


Images: TypeAlias = ImageSet | LabelledPixels | tuple[Tensor | np.ndarray, Tensor | np.ndarray]


Pixels: TypeAlias = Images | Tensor | np.ndarray


def check_pixels(x: Tensor | np.ndarray, what: str = "pixels") -> Tensor:
    """Return ``x`` as float32 within [0, 1], detached. Pixels outside by rounding alone are moved to the edge.

    The returned pixels are those to judge, hash and measure.

    Args:
        x: images (N, C, H, W), N >= 1: floats, finite and within [0, 1] up to ``box_rounding``, or uint8, which is
            divided by 255. A tensor or a NumPy array.
        what: name of the pixels for error messages.

    Raises:
        InputError: ``x`` is anything else.

    Warns:
        RoundingWarning: pixels were moved. The message gives their number and the largest excess.
    """
    given = as_tensor(x)
    if (
        not isinstance(given, Tensor)
        or given.ndim != 4
        or given.dtype not in (*_FLOATS, torch.uint8)
        or given.numel() == 0
    ):
        raise InputError(f"images must be a float tensor (N, C, H, W) with N >= 1, or one of uint8, got {_describe(x)}")
    if given.dtype == torch.uint8:
        return as_pixels(given, given.device)
    pixels = given.detach().float()
    low, high = float(pixels.min()), float(pixels.max())
    rounding = box_rounding(given.dtype)
    if not (low >= -rounding and high <= 1 + rounding):  # written so that NaN fails too
        raise InputError(
            f"{what} must be finite and lie in [0, 1], got minimum {low!r} and maximum {high!r} (up to {rounding:.2g} "
            "outside is taken for rounding); divide images of 0 to 255 by 255, and move normalization into the model"
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


def as_tensor(values: object) -> object:
    """Return a NumPy array as the tensor of its values, where torch has such a type, and anything else as it is."""
    if not isinstance(values, np.ndarray):
        return values
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(np.ascontiguousarray(native))
    except TypeError:
        return values


def box_rounding(dtype: torch.dtype) -> float:
    """Return the distance outside [0, 1] that is rounding in ``dtype``: ``ROUNDING``, or one step above 1 if larger."""
    return max(ROUNDING, torch.finfo(dtype).eps)


def check_class_indices(y: object, num_images: int, num_classes: int | None = None) -> Tensor:
    """Return ``y`` as int64 on the CPU.

    Raises:
        InputError: it is not an integer tensor or array (num_images,) with values 0..num_classes - 1.
    """
    given, y = y, as_tensor(y)
    if not isinstance(y, Tensor) or y.shape != (num_images,) or y.dtype not in _INTEGERS:
        raise InputError(
            f"labels must be an integer tensor of shape ({num_images},), class indices from 0, got {_describe(given)}; "
            "give e.g. torch.as_tensor(labels) of whole numbers, and .long() for those stored as floats"
        )
    y = y.long().cpu()
    if int(y.min()) < 0 or (num_classes is not None and int(y.max()) >= num_classes):
        allowed = "at least 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise InputError(f"labels must be {allowed}, got {int(y.min())} to {int(y.max())}")
    return y


def unlabelled_pixels(images: Pixels, kind: ImageKind = ANY_KIND) -> Tensor:
    """Return the pixels of ``images``, as ``check_pixels`` takes them or with labels as ``labelled_pixels`` does.

    Raises:
        InputError: ``images`` is anything else, or of a different kind.
    """
    if isinstance(images, ImageSet):
        kind.check_shape(images.shape, f"the images of {images.name} ({images.split})", "those of the model")
        return images.pixels()
    if isinstance(images, LabelledPixels):
        return images.x
    return check_pixels(images[0] if isinstance(images, tuple) and len(images) == 2 else images)


def labelled_pixels(images: Images, num_classes: int | None = None, kind: ImageKind = ANY_KIND) -> LabelledPixels:
    """Return ``images`` as validated pixels, labels and ids.

    Args:
        images: an ImageSet with labels, or a pair (images as ``check_pixels`` takes them, integer labels (N,)). The
            ids of a pair are hashes of the pixels.
        num_classes: number of classes of the model, where it is known.
        kind: the images that the model takes, where they are known. A pair has no class names to compare.

    Raises:
        InputError: ``images`` is anything else, or of a different kind.
    """
    if isinstance(images, LabelledPixels):
        pixels = images
    elif isinstance(images, ImageSet):
        if images.labels is None:
            raise InputError(
                f"{images.name} ({images.split}) has no labels, but certification and attacks need them; give "
                "labelled images"
            )
        what = f"the images of {images.name} ({images.split})"
        kind.check_shape(images.shape, what, "those of the model")
        kind.check_classes(images.classes, what, "the model")
        pixels = LabelledPixels(images.pixels(), images.labels, tuple(str(i) for i in images.ids))
    elif isinstance(images, tuple) and len(images) == 2:
        x = check_pixels(images[0]).cpu()
        pixels = LabelledPixels(x, check_class_indices(images[1], len(x)), pixel_ids(x))
    else:
        raise InputError(f"images must be an ImageSet or a pair (images, labels), got {type(images).__name__}")
    kind.check_shape(tuple(pixels.x.shape[1:]), "the images", "those of the model")
    check_class_indices(pixels.y, len(pixels), num_classes)
    return pixels


def kind_of(model: object) -> ImageKind:
    """Return the kind of images that ``model`` takes, as far as it is known, as for smoothed classifiers and runs."""
    kind = getattr(model, "kind", None)
    return kind if isinstance(kind, ImageKind) else ANY_KIND


def pixel_ids(x: Tensor) -> tuple[str, ...]:
    """Return an id per image of ``x`` (N, C, H, W): SHA-256 of shape and float32 pixels, 32 hex digits."""
    return tuple(
        hashlib.sha256(
            repr(tuple(image.shape)).encode() + image.float().cpu().contiguous().numpy().tobytes()
        ).hexdigest()[:32]
        for image in x.detach()
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array, {value.dtype} of shape {value.shape}"
    return type(value).__name__
