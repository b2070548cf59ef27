"""Encoded image files (PNG, JPEG, WebP, BMP, ...) to one uint8 tensor, decoded by several threads."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rush.data.resizing import fit_square, num_threads
from rush.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 1024
Encoded = tuple[str, bytes | memoryview | Path]
"""A name for error texts, and the encoded bytes or the file that holds them."""


@dataclass(frozen=True)
class Form:
    """The shape (C, H, W) that all images of a set share, and the name of an image that has it."""

    shape: tuple[int, int, int]
    example: str

    def fit(self, image: np.ndarray, where: str) -> np.ndarray:
        """``image`` (1 or 3, H, W) in this shape, greyscale repeated over three channels.

        Raises: DataError naming the image when it is of another size, or in colour where the form is greyscale.
        """
        if image.shape[1:] != self.shape[1:]:
            raise DataError(
                f"{where} is {_size(image.shape)}, but {self.example} is {_size(self.shape)} (width x height); "
                "all images of a set must share one size: set size (data.size in a recipe), or resize or crop them"
            )
        if len(image) > self.shape[0]:
            raise DataError(
                f"{where} is in colour, but the set was taken to be greyscale after {self.example}; "
                "convert its images to one of the two"
            )
        return image if len(image) == self.shape[0] else np.repeat(image, self.shape[0], axis=0)


def decode_images(encoded: Iterable[Encoded], total: int, size: int | None = None) -> torch.Tensor:
    """uint8 (N, C, H, W) of the N = ``total`` images in ``encoded``, in order; C is 1 if all are greyscale, else 3.

    As ``decode`` makes them; greyscale among RGB is repeated over the channels. ``size``: H = W = size.
    Raises: DataError as ``decode``, or naming the first image of another size.
    """
    images: np.ndarray | None = None
    first = ""
    for row, (where, image) in enumerate(_decoded(iter(encoded), size)):
        if images is None:
            images, first = np.empty((total, *image.shape), np.uint8), where
        if len(image) > images.shape[1]:
            images = np.repeat(images, len(image), axis=1)
        images[row] = Form((images.shape[1], *images.shape[2:]), first).fit(image, where)
    if images is None:
        raise DataError("no image to decode; the set is empty")
    return torch.from_numpy(images)


def decode(encoded: Encoded, size: int | None = None) -> np.ndarray:
    """uint8 (C, H, W) of one image, C being 1 or 3; with ``size`` through ``fit_square``.

    Palettes become RGB; a fully opaque alpha channel is dropped.
    Raises: DataError naming the image when it cannot be decoded, has transparency or more than 8 bits.
    """
    from PIL import Image

    where, source = encoded
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
            plain = _plain(image, where)
            pixels = np.asarray(plain if size is None else fit_square(plain, size))
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where} cannot be decoded: {error}; it is truncated, damaged or no image: replace or remove it"
        ) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _decoded(encoded: Iterator[Encoded], size: int | None) -> Iterator[tuple[str, np.ndarray]]:
    with ThreadPoolExecutor(num_threads()) as pool:
        while chunk := list(islice(encoded, _CHUNK)):
            yield from zip((where for where, _ in chunk), pool.map(partial(decode, size=size), chunk), strict=True)


def _plain(image: "Image.Image", where: str) -> "Image.Image":
    """``image`` in mode L or RGB, without loss."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        return _opaque(image.convert("RGBA"), "L" if image.mode == "LA" else "RGB", where)
    if image.mode == "P":
        return image.convert("RGB")
    raise DataError(f"{where} has mode {image.mode}, allowed are 8-bit greyscale, RGB and palette; convert it first")


def _opaque(image: "Image.Image", mode: str, where: str) -> "Image.Image":
    if image.getchannel("A").getextrema() != (255, 255):
        raise DataError(f"{where} has transparent pixels; put it on a background of your choice first")
    return image.convert("RGB").getchannel("R") if mode == "L" else image.convert("RGB")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]}x{shape[-2]}"
