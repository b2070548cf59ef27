"""Images in memory, as the whole library uses them: 8-bit pixels with labels, class names and ids, and subsets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from rush.data.indexing import Index, positions
from rush.data.kind import shape_text
from rush.data.labels import check_labels, label_bytes
from rush.errors import DataError, InputError
from rush.runtime.numbers import as_real, as_whole
from rush.runtime.randomness import stream


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """One split of a data set, on the CPU.

    ``images[index]`` takes a slice, integers or a boolean mask, and keeps ids and labels with their pixels.

    Args:
        images: uint8 (N, C, H, W), N >= 1.
        labels: int64 (N,) in 0..K-1, or None.
        classes: the K class names.
        ids: text (N,), unique.
        name: name of the data set.
        split: name of the split.

    Raises:
        DataError: a field has the wrong type or shape, lengths differ, a label is out of range, an id is duplicate or
            N is 0.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    classes: tuple[str, ...]
    ids: np.ndarray
    name: str
    split: str

    def __post_init__(self) -> None:
        where = f"{self.name}/{self.split}"
        _check_images(self.images, where)
        _check_classes(self.classes, where)
        _check_ids(self.ids, len(self.images), where)
        if self.labels is not None:
            _check_label_type(self.labels, where)
            check_labels(self.labels.numpy(), len(self.images), len(self.classes), where)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        labelled = "no labels" if self.labels is None else f"{self.num_classes} classes"
        return f"ImageSet({self.name}/{self.split}: {len(self)} images of {shape_text(self.shape)}, {labelled})"

    def __getitem__(self, index: Index) -> "ImageSet":
        """Return the selected images with their ids and labels.

        Raises:
            InputError: ``index`` is of a wrong type, out of range, or selects nothing.
        """
        rows = positions(index, len(self))
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, images=self.images[rows], labels=labels, ids=self.ids[rows])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def pixels(self, indices: Index | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return float32 (n, C, H, W) in [0, 1], ``images.float() / 255``, of all or the selected images."""
        return as_pixels(self.images if indices is None else self.images[positions(indices, len(self))], device)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over ids, shape, pixels and labels, in this order; not over class names or the set's name."""
        digest = hashlib.sha256(json.dumps([self.ids.tolist(), list(self.images.shape)]).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(label_bytes(self.labels))
        return digest.hexdigest()

    def without_labels(self) -> "ImageSet":
        """Return the same images with ``labels`` None, so that pre-training cannot read them."""
        return replace(self, labels=None)


def as_pixels(images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return 8-bit ``images`` as float32 in [0, 1] on ``device``: ``images.float() / 255``."""
    # CUDA would turn a Python scalar into a multiplication by 1/255, which rounds differently from a division.
    return images.to(device).float().div_(torch.tensor(255.0, device=device))


def evaluation_order(total: int, count: int | None, seed: int) -> list[int]:
    """Return the first ``count`` positions (all for None) of the one seeded order in which images are evaluated.

    Random: a permutation of ``total`` positions, from ``stream(seed, "evaluation", "order")``.
    """
    return torch.randperm(total, generator=stream(seed, "evaluation", "order"))[:count].tolist()


def stratified_subset(images: ImageSet, n_or_fraction: int | float, generator: torch.Generator) -> ImageSet:
    """Draw a random subset in which every class present keeps its share, in the original order.

    Shares are rounded by largest remainder, so that balanced classes differ by at most one image. Every class present
    gets at least one image.

    Args:
        images: the labelled set, of N images.
        n_or_fraction: number of images (int, 1..N), or share of them (float in (0, 1], rounded to whole images).
        generator: draws the images of each class.

    Raises:
        InputError: ``images`` has no labels, or the size is out of range or below the number of classes present.
    """
    if images.labels is None:
        raise InputError(f"{images!r} has no labels to stratify by; use images[index]")
    _check_generator(generator)
    size = _subset_size(n_or_fraction, len(images), len(images.labels.unique()))
    return images[_stratified_rows(images.labels.numpy(), size, generator, least=1)]


def hold_out(images: ImageSet, count: int, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Split off ``count`` random images and return (the others, these), both in the original order.

    With labels, every class gives its share, rounded by largest remainder. A rare class may give none. Without labels,
    all images are equally likely.

    Args:
        images: the set, of N images.
        count: number of images to hold out, 1..N-1.
        generator: draws them.

    Raises:
        InputError: ``count`` is out of range.
    """
    held_out = held_out_rows(images.labels, len(images), count, generator)
    return images[np.setdiff1d(np.arange(len(images)), held_out)], images[held_out]


def held_out_rows(labels: torch.Tensor | None, total: int, count: int, generator: torch.Generator) -> np.ndarray:
    """Return the ``count`` of ``total`` rows that ``hold_out`` draws, ascending, or raise InputError as it does."""
    _check_generator(generator)
    whole = as_whole(count)
    if whole is None or not 1 <= whole < total:
        raise InputError(f"the number of images to hold out must be in 1..{total - 1} of {total}, got {count!r}")
    if labels is None:
        order = torch.randperm(total, generator=generator, device=generator.device)
        return np.sort(order[:whole].cpu().numpy())
    return _stratified_rows(labels.numpy(), whole, generator, least=0)


def numbered_ids(split: str, count: int) -> np.ndarray:
    """Return the ids "<split>-<row>" of images that have none of their own."""
    return np.array([f"{split}-{row:05d}" for row in range(count)])


def concatenate(parts: Sequence[ImageSet]) -> ImageSet:
    """Join splits of one data set, in order. A single part is returned as it is.

    Labels are None if any part has none. Greyscale images among RGB are repeated over the channels. Ids are prefixed by
    their split, "<split>/<id>", where they would not be unique.

    Raises:
        DataError: sizes or classes differ, or two parts hold the same images.
    """
    if len(parts) == 1:
        return parts[0]
    split = "+".join(part.split for part in parts)
    where = f"{parts[0].name}/{split}"
    classes = common_classes([part.classes for part in parts], where)
    sides = {tuple(part.images.shape[2:]) for part in parts}
    if len(sides) > 1:
        raise DataError(
            f"{where}: the parts have images of {sorted(sides)} (height, width); give size to bring them to one size"
        )
    for number, part in enumerate(parts):
        if any(part.images.equal(other.images) for other in parts[:number]):
            raise DataError(f"{where}: split {part.split!r} holds the images of another part; name it once")
    labels = [part.labels for part in parts if part.labels is not None]
    channels = max(part.images.shape[1] for part in parts)
    return ImageSet(
        torch.cat([part.images.expand(-1, channels, -1, -1) for part in parts]),
        torch.cat(labels) if len(labels) == len(parts) else None,
        classes,
        unique_ids([part.ids for part in parts], [part.split for part in parts]),
        parts[0].name,
        split,
    )


def common_classes(parts: Sequence[tuple[str, ...]], where: str) -> tuple[str, ...]:
    """Return the longest of the class lists, or raise DataError unless all others are its beginning, or empty."""
    longest = max(parts, key=len)
    for classes in parts:
        if classes != longest[: len(classes)]:
            raise DataError(f"{where}: the parts have the classes {classes} and {longest}; join splits of one data set")
    return longest


def unique_ids(parts: Sequence[np.ndarray], splits: Sequence[str]) -> np.ndarray:
    """Return the ids of all parts, (N,), each prefixed by its split, "<split>/<id>", unless they are unique."""
    ids = np.concatenate(parts)
    if len(np.unique(ids)) == len(ids):
        return ids
    return np.array([f"{split}/{name}" for part, split in zip(parts, splits, strict=True) for name in part.tolist()])


def stratified_counts(counts: np.ndarray, size: int, least: int = 1) -> np.ndarray:
    """Return the number of images that each class gets of ``size``, in proportion to its positive ``counts``.

    Quotas (K,) are rounded by largest remainder, exactly in integers, and are at least ``least`` (0 or 1). Ties go to
    the earlier class. Requires least * len(counts) <= size <= counts.sum().
    """
    total = counts.sum()
    due = size * counts  # in units of 1 / total images
    quotas = np.maximum(due // total, least)
    while quotas.sum() < size:
        quotas[np.argmax(np.where(quotas < counts, due - quotas * total, -(total**2)))] += 1
    while quotas.sum() > size:
        quotas[np.argmax(np.where(quotas > least, quotas * total - due, -(total**2)))] -= 1
    return quotas


def _stratified_rows(labels: np.ndarray, size: int, generator: torch.Generator, least: int) -> np.ndarray:
    """Return ``size`` rows, ascending, in which each class present has its share. They are drawn class by class."""
    present, counts = np.unique(labels, return_counts=True)
    drawn = []
    for label, quota in zip(present, stratified_counts(counts, size, least), strict=True):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=generator, device=generator.device)
        drawn.append(members[order[:quota].cpu().numpy()])
    return np.sort(np.concatenate(drawn))


def _subset_size(n_or_fraction: int | float, total: int, num_present: int) -> int:
    count, share = as_whole(n_or_fraction), as_real(n_or_fraction)
    if share is None or not (1 <= share <= total if count is not None else 0 < share <= 1):
        raise InputError(f"subset size must be an int in 1..{total} or a float in (0, 1], got {n_or_fraction!r}")
    size = round(share * total) if count is None else count
    if size < num_present:
        raise InputError(
            f"{n_or_fraction!r} of {total} images is {size}, fewer than the {num_present} classes present; "
            f"ask for at least {num_present} images"
        )
    return size


def _check_generator(generator: torch.Generator) -> None:
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator must be a torch.Generator, e.g. rush.stream(seed, 'subset'), got {generator!r}")


def _check_images(images: torch.Tensor, where: str) -> None:
    is_tensor = isinstance(images, torch.Tensor)
    if not (is_tensor and images.dtype == torch.uint8 and images.ndim == 4 and images.device.type == "cpu"):
        actual = f"{images.dtype} {tuple(images.shape)} on {images.device}" if is_tensor else type(images).__name__
        raise DataError(
            f"{where}: images must be a torch.uint8 tensor (N, C, H, W) with values 0..255 on the cpu, got {actual}; "
            "convert it first"
        )
    if images.numel() == 0:
        raise DataError(
            f"{where}: empty, images have shape {tuple(images.shape)}; give at least one image with at least one pixel"
        )


def _check_classes(classes: tuple[str, ...], where: str) -> None:
    if not isinstance(classes, tuple) or len({name for name in classes if isinstance(name, str)}) != len(classes):
        raise DataError(f"{where}: classes must be a tuple of distinct names, got {classes!r}")


def _check_ids(ids: np.ndarray, num_images: int, where: str) -> None:
    if not isinstance(ids, np.ndarray) or ids.dtype.kind != "U" or ids.shape != (num_images,):
        actual = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise DataError(
            f"{where}: ids must be a numpy array of str of shape ({num_images},), got {actual}; "
            "use np.array([...], dtype=str)"
        )
    if len(set(ids.tolist())) != num_images:
        names, counts = np.unique(ids, return_counts=True)
        raise DataError(
            f"{where}: ids must be unique, {str(names[counts.argmax()])!r} occurs {counts.max()} times; "
            "select or name each image once"
        )


def _check_label_type(labels: torch.Tensor, where: str) -> None:
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.device.type != "cpu":
        actual = f"{labels.dtype} on {labels.device}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise DataError(
            f"{where}: labels must be None or a torch.int64 tensor (N,) on the cpu, got {actual}; use "
            "labels.long().cpu()"
        )
