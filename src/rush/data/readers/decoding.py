"""Decoding of image files to uint8 arrays: the one reader for training, evaluation and prediction."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

from rush.data.readers.damage import name_damage
from rush.data.readers.entries import describe_kind
from rush.data.readers.resizing import fit_image, num_threads
from rush.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are read, by Pillow's names. A file is recognized by its content."""
MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image: 8192 x 8192."""
MAX_BYTES = 1 << 28
"""Largest number of bytes of an encoded image."""
_CHUNK = 1024  # images handed to the threads at a time
_BITS_PER_SAMPLE, _ORIENTATION = 258, 274  # tags of TIFF and EXIF
Encoded = tuple[str, bytes | memoryview | Path]
"""A name for error messages, and the encoded bytes or the file that holds them."""


@dataclass(frozen=True)
class Form:
    """The shape (C, H, W) that all images of a set share, and the name of one that has it."""

    shape: tuple[int, int, int]
    example: str

    def fit(self, image: np.ndarray, where: str) -> np.ndarray:
        """Return ``image`` (1 or 3, H, W) in this shape, greyscale repeated over three channels.

        Raises:
            DataError: the image, named by ``where``, has a different size, or is in colour and this shape is greyscale.
        """
        if image.shape[1:] != self.shape[1:]:
            raise DataError(
                f"{where} is {_size(image.shape)}, but {self.example} is {_size(self.shape)} (width x height); "
                "all images of a set must share one size: set size (data.size in a recipe), or resize or crop them"
            )
        if len(image) > self.shape[0]:
            raise DataError(
                f"{where} is in colour, but {self.example} is greyscale, and so the set was taken to be; "
                "convert all its images to one of the two"
            )
        return image if len(image) == self.shape[0] else np.repeat(image, self.shape[0], axis=0)


def decode_images(encoded: Iterable[Encoded], total: int, size: int | None = None) -> torch.Tensor:
    """Decode all images, by several threads, into one tensor.

    Args:
        encoded: the images, at least one. Each is decoded by ``decode``.
        total: number of images, N.
        size: H = W, in pixels. None keeps the images as stored.

    Returns:
        uint8 (N, C, H, W), in order. C is 1 if all images are greyscale, else 3, greyscale ones being repeated.

    Raises:
        DataError: as ``decode``, or an image has a different size from the first, or memory does not hold all N images.
    """
    decoded = _decoded(iter(encoded), size)
    first, image = next(decoded)
    images = _allocated((total, *image.shape), first)
    images[0] = image
    for row, (where, image) in zip(range(1, total), decoded, strict=True):
        if len(image) > images.shape[1]:  # the first image in colour
            images = np.repeat(images, len(image), axis=1)
        images[row] = Form((images.shape[1], *images.shape[2:]), first).fit(image, where)
    return torch.from_numpy(images)


def decode(encoded: Encoded, size: int | tuple[int, int] | None = None) -> np.ndarray:
    """Decode one image to uint8 (C, H, W), C being 1 or 3.

    The EXIF orientation is applied. Unreadable EXIF data are ignored. Palettes become RGB, and bilevel images 0 and
    255. A fully opaque alpha channel is dropped.

    Args:
        encoded: the image. Its content decides the format: PNG, JPEG, WebP, BMP, GIF, TIFF or PPM.
        size: None for the image as it is. An integer for its central square, resampled to size x size pixels. A pair
            (height, width) for the largest central part of these proportions, resampled to this size.

    Raises:
        DataError: the image is not a regular file, is damaged, has a different format, is larger than ``MAX_PIXELS`` or
            ``MAX_BYTES`` (checked before decoding), is animated or has several pages, or has a transparent pixel, more
            than 8 bits per channel, or a mode other than greyscale, RGB and palette. The message names the image.
    """
    where, source = encoded
    remedy = "it is truncated, damaged or not an image: replace or remove it"
    with name_damage(f"{where} cannot be decoded", remedy), _opened(where, source) as file:
        image = _identified(file, where)
        _check_plain(image, where)
        plain = _opaque(_upright(image), where)
        height, width = (size, size) if isinstance(size, int) else size or plain.size[::-1]
        pixels = np.asarray(fit_image(plain, width, height))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # from (H, W) or (H, W, 3)


def _allocated(shape: tuple[int, ...], where: str) -> np.ndarray:
    """Return an uninitialized uint8 array, or raise DataError if memory does not hold it."""
    try:
        return np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:
        raise DataError(
            f"{shape[0]} images of the size of {where}, {_size(shape)}, do not fit in memory; give a smaller size "
            "(data.size in a recipe), or stream them"
        ) from error


def _decoded(encoded: Iterator[Encoded], size: int | None) -> Iterator[tuple[str, np.ndarray]]:
    with ThreadPoolExecutor(num_threads()) as pool:
        while chunk := list(islice(encoded, _CHUNK)):
            yield from zip((where for where, _ in chunk), pool.map(partial(decode, size=size), chunk), strict=True)


def _opened(where: str, source: bytes | memoryview | Path) -> IO[bytes]:
    """Return ``source`` as an open file, or raise DataError unless it is bytes or a regular file of allowed length."""
    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"{where} is {describe_kind(source)}, not an image file; give an image file")
    length = source.stat().st_size if isinstance(source, Path) else len(source)
    if length > MAX_BYTES:
        raise DataError(f"{where} has {length} bytes, at most {MAX_BYTES} are read; store it smaller")
    return source.open("rb") if isinstance(source, Path) else BytesIO(source)


def _identified(file: IO[bytes], where: str) -> "Image.Image":
    """Return the image in ``file``, opened but not decoded.

    This is ``PIL.Image.open`` for ``FORMATS``, without Pillow's own limit on pixels, which warns instead of refusing.
    """
    from PIL import Image

    Image.init()
    prefix = file.read(16)
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is not None and (accepts is None or accepts(prefix) is True):
            file.seek(0)
            image = factory(file, "")
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{where} is {image.width}x{image.height}, at most {MAX_PIXELS} pixels are read; store it smaller"
                )
            return image
    raise DataError(
        f"{where} cannot be read as an image: allowed are {', '.join(FORMATS)}; convert, replace or remove it"
    )


def _check_plain(image: "Image.Image", where: str) -> None:
    """Raise DataError for several images in one file, more than 8 bits per channel, and modes that are not read."""
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(f"{where} holds several images (an animation or pages); store the intended one by itself")
    mode = f"{image.mode} with more than 8 bits per channel" if _is_deep(image) else image.mode
    if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise DataError(f"{where} has mode {mode}, allowed are 8-bit greyscale, RGB and palette; convert it first")


def _is_deep(image: "Image.Image") -> bool:
    """Return whether the file has more than 8 bits per channel, which Pillow truncates in some modes."""
    depths = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, 0)
    if image.mode in ("L", "LA", "RGB", "RGBA") and max(depths if isinstance(depths, tuple) else (depths,)) > 8:
        return True
    for codec, _, _, arguments in getattr(image, "tile", ()):
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(isinstance(value, str) and value.startswith(("L", "RGB")) and ";16" in value for value in values):
            return True
        if codec.startswith("ppm") and any(isinstance(value, int) and value > 255 for value in values):
            return True
    return False


def _upright(image: "Image.Image") -> "Image.Image":
    """Return ``image`` decoded and rotated by its EXIF orientation."""
    from PIL import ImageOps

    image.load()
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # the metadata are damaged, but the pixels could be read
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _opaque(image: "Image.Image", where: str) -> "Image.Image":
    """Return ``image`` in mode L or RGB, without loss, or raise DataError if a pixel is transparent."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        grey = image.mode in ("1", "L", "LA")
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{where} has transparent pixels; compose it with a background first")
        return image.getchannel("R") if grey else image.convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]}x{shape[-2]}"
