"""The door for images and labels: checked once, with errors that carry everything."""

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rush.checks import check_positive_integer as check_positive_integer  # also found here
from rush.data.images import ImageSet
from rush.errors import InputError


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


def check_pixels(x: Tensor) -> None:
    """Raises InputError unless ``x`` is float (N, C, H, W), N >= 1, finite and within [0, 1]."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or x.numel() == 0:
        given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"images must be a float tensor (N, C, H, W) with N >= 1, got {given}")
    low, high = float(x.detach().min()), float(x.detach().max())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise InputError(
            f"pixels must be finite and lie in [0, 1], got minimum {low:g} and maximum {high:g}; "
            "divide uint8 images by 255 and move normalization into the model"
        )


def check_labels(y: Tensor, num_images: int, num_classes: int | None = None) -> None:
    """Raises InputError unless ``y`` is integer (num_images,) with values 0 .. num_classes - 1."""
    if not isinstance(y, Tensor) or y.shape != (num_images,) or y.is_floating_point() or y.dtype == torch.bool:
        given = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"labels must be an integer tensor of shape ({num_images},), got {given}")
    if int(y.min()) < 0 or (num_classes is not None and int(y.max()) >= num_classes):
        allowed = "at least 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise InputError(f"labels must be {allowed}, got {int(y.min())} to {int(y.max())}")


def labelled_pixels(images: Images, num_classes: int | None = None) -> LabelledPixels:
    """``images`` as checked pixels, labels and ids; a pair of tensors gets ids from a hash of the pixels.

    Raises: InputError for anything but an ImageSet with labels or a pair (float images in [0, 1], labels).
    """
    if isinstance(images, LabelledPixels):
        found = images
    elif isinstance(images, ImageSet):
        if images.labels is None:
            raise InputError(f"{images.name} ({images.split}) has no labels; certification and attacks need them")
        found = LabelledPixels(images.pixels(), images.labels, tuple(str(i) for i in images.ids))
    elif isinstance(images, tuple) and len(images) == 2:
        check_pixels(images[0])
        x = images[0].detach().float().cpu()
        check_labels(images[1], len(x))
        found = LabelledPixels(x, images[1].long().cpu(), pixel_ids(x))
    else:
        raise InputError(f"images must be an ImageSet or a pair (float images, labels), got {type(images).__name__}")
    check_labels(found.y, len(found), num_classes)
    return found


def pixel_ids(x: Tensor) -> tuple[str, ...]:
    """An id per image of ``x`` (N, C, H, W): SHA-256 of shape and float32 pixels, 32 hex digits."""
    return tuple(
        hashlib.sha256(
            repr(tuple(image.shape)).encode() + image.float().cpu().contiguous().numpy().tobytes()
        ).hexdigest()[:32]
        for image in x.detach()
    )
