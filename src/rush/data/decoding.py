"""Encoded image files (PNG, JPEG, WebP, BMP, ...) to one uint8 tensor, decoded by several threads."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rush.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 1024
Encoded = tuple[str, bytes | Path]
"""A name for error texts, and the encoded bytes or the file that holds them."""


def decode_images(encoded: Iterable[Encoded], total: int) -> torch.Tensor:
    """uint8 (N, C, H, W) of the N = ``total`` images in ``encoded``, in order; C is 1 if all are greyscale, else 3.

    Greyscale among RGB is repeated over the channels; palettes become RGB; a fully opaque alpha channel is dropped.
    Raises: DataError naming the first image that cannot be decoded, has transparency or more than 8 bits, or another
    size.
    """
    images: np.ndarray | None = None
    first = ""
    for row, (where, image) in enumerate(_decoded(iter(encoded))):
        if images is None:
            images, first = np.empty((total, *image.shape), np.uint8), where
        if image.shape[1:] != images.shape[2:]:
            raise DataError(
                f"{where} is {_size(image.shape)}, but {first} is {_size(images.shape)} (width x height); "
                "all images of a set must share one size: resize or crop them first"
            )
        if len(image) > images.shape[1]:
            images = np.repeat(images, len(image), axis=1)
        images[row] = image
    if images is None:
        raise DataError("no image to decode; the set is empty")
    return torch.from_numpy(images)


def _decoded(encoded: Iterator[Encoded]) -> Iterator[tuple[str, np.ndarray]]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(encoded, _CHUNK)):
            yield from zip((where for where, _ in chunk), pool.map(_decode, chunk), strict=True)


def _decode(encoded: Encoded) -> np.ndarray:
    from PIL import Image

    where, source = encoded
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            pixels = np.asarray(_plain(image, where))
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where} cannot be decoded: {error}; it is truncated, damaged or no image: replace or remove it"
        ) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


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
