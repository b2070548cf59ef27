"""Loading of images by name or path: the data sets known by name, folders and files."""

import difflib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from rush.data.images import ImageSet, concatenate
from rush.data.labels import check_several_classes
from rush.data.readers.archives import Archive, locate
from rush.data.readers.cache import decode_all
from rush.data.readers.cifar import cifar10_versions, cifar100_versions, read_cifar
from rush.data.readers.decoding import decode
from rush.data.readers.digits import NUM_TEST, load_digits
from rush.data.readers.download import fetch
from rush.data.readers.encoded import EncodedImages, join
from rush.data.readers.entries import describe_kind
from rush.data.readers.folders import first_image, open_folder
from rush.data.readers.npz import load_npz, npz_bytes
from rush.data.readers.parquet import open_shards, parquet_folder
from rush.data.readers.resizing import check_size, resize_images
from rush.data.readers.roots import Root, joined_names, root_folders, without_repeats
from rush.data.readers.stl10 import ROWS, STL10, read_stl10
from rush.errors import DataError

SPLITS: dict[str, dict[str, int]] = {
    "digits": {"train": 1_397, "test": NUM_TEST},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "stl10": ROWS,
}
"""Number of images of each split, by the names of the known data sets."""
ROOT_VARIABLE = "RUSH_DATA"
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "stl10": (3, 96, 96)}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10}
Read = Callable[[Path, str, int | None], ImageSet]
"""Reader of an official archive or its folder: takes the path, the split and the size."""


def load_images(
    name_or_path: str | os.PathLike[str],
    split: str = "test",
    root: Root = None,
    download: bool = True,
    *,
    size: int | None = None,
) -> ImageSet:
    """Load a split of a data set known by name, or the images at a path.

    Official data sets are read from their archives, the extracted folders, or Hugging Face style parquet shards, in
    ``root`` or ``root``/name. Without any of these, the official archive is downloaded.

    Args:
        name_or_path: "digits" (embedded in scikit-learn), "cifar10", "cifar100" (fine labels) or "stl10"; or the path
            of a folder of class folders, a folder of parquet shards, or an .npz file, relative to ``root`` if given.
        split: one split ("stl10" also has "unlabeled"), or several joined by "+" as in "train+unlabeled". Joined splits
            follow each other. They have no labels if any part has none, and ids "<split>/<id>" where ids are not
            unique.
        root: an existing folder. None means the environment variable RUSH_DATA, else the user's cache folder. With a
            list of folders, shards are joined as if all lay in one, and each folder must hold some. The first official
            archive found is read, and a download goes to the first folder. Class folders and .npz files must lie in
            only one of the folders.
        download: whether a missing official archive may be downloaded to ``root``.
        size: side in pixels to which each image's central square is resampled. None keeps the images as stored, which
            must share one size.

    Returns:
        The images as uint8 (N, C, H, W), with labels int64 (N,) or None, class names and ids.

    Raises:
        DataError: the name or split is unknown, or the data are missing, truncated, altered, of a wrong shape,
            mislabelled, empty or of one class only. The message names the file and the remedy.
        InputError: a wrong ``size`` or ``root``.

    Example:
        >>> import rush
        >>> images = rush.load_images("digits", split="test")
        >>> images
        ImageSet(digits/test: 400 images of 1x8x8, 10 classes)
        >>> images.images.dtype, images.labels[:5].tolist()
        (torch.uint8, [0, 5, 7, 8, 0])
        >>> images[-2:].ids.tolist()
        ['digits-1783', 'digits-1792']
        >>> pixels = images.pixels()  # float32 in [0, 1]
        >>> float(pixels.min()), float(pixels.max())
        (0.0, 1.0)
    """
    check_size(size)
    if not isinstance(split, str):
        raise DataError(f"split must be text such as 'test' or 'train+unlabeled', got {split!r}")
    name, parts = os.fspath(name_or_path), split.split("+")
    if _is_known(name_or_path) and name != "digits":
        images = _load_official(name, parts, root, download, size)
    else:
        images = _load(_source(name_or_path, parts, root), parts, size)
    check_several_classes(images.labels, images.classes, split, f"{name} ({split})")
    return images


def open_encoded(name_or_path: str | os.PathLike[str], split: str, root: Root = None) -> EncodedImages | None:
    """Open the encoded images of a split, or of several joined by "+", to be read as needed.

    Arguments are as in ``load_images``. The result is None for data that are not stored image by image: official
    archives, .npz files and the digits.

    Raises:
        DataError: as ``load_images``.
    """
    source = _source(name_or_path, split.split("+"), root)
    return None if isinstance(source, str | Path) else source


def is_divided(name_or_path: str | os.PathLike[str], root: Root = None) -> bool:
    """Return whether the splits "train" and "test" are different images, or one of them is missing.

    A folder of class folders, or a file, that is not divided into splits has all of its images in each of them.

    Raises:
        DataError: ``root`` is not a directory.
    """
    if _is_known(name_or_path):
        return True
    train, test = (split_or_none(name_or_path, split, root) for split in ("train", "test"))
    if train is None or test is None:
        return True
    if isinstance(train, ImageSet) or isinstance(test, ImageSet):
        return not (isinstance(train, ImageSet) and isinstance(test, ImageSet) and test.images.equal(train.images))
    return test.files() != train.files()


def split_or_none(name: str | os.PathLike[str], split: str, root: Root) -> EncodedImages | ImageSet | None:
    """Return the images of a split, decoded or not, or None where ``load_images`` raises DataError."""
    try:
        return open_encoded(name, split, root) or load_images(name, split, root)
    except DataError:
        return None


def decoded_bytes(
    name_or_path: str | os.PathLike[str], split: str, root: Root = None, *, size: int | None = None
) -> int:
    """Estimate the memory in bytes that ``load_images`` would take for the images of ``split``.

    For shards and folders this is the number of images times the size of the first one. Nothing else is decoded, and
    nothing is downloaded.

    Raises:
        DataError: as ``load_images``.
    """
    parts = split.split("+")
    source = _source(name_or_path, parts, root)
    if isinstance(source, str):
        channels, side, _ = SHAPES[source]
        return sum(SPLITS[source][part] for part in parts) * channels * (size or side) ** 2
    if isinstance(source, Path):
        return sum(npz_bytes(source, part) for part in parts)
    return len(source) * decode(next(source.read(np.arange(1))), size).size


def find_official(name: str, root: Root = None) -> Path | None:
    """Return the archive, extracted folder or folder of shards that ``load_images`` reads for a known name, if any.

    Raises:
        DataError: ``root`` is not a directory, or an archive has a wrong hash.
    """
    roots = _roots(root)
    located = locate(_official_readers(name), roots, name)
    if located is not None:
        return located[1]
    shards = (parquet_folder(folder) or parquet_folder(folder / name) for folder in roots)
    return next((folder for folder in shards if folder is not None), None)


def _source(name_or_path: str | os.PathLike[str], parts: Sequence[str], root: Root) -> EncodedImages | Path | str:
    """Return the encoded images of the splits ``parts``, or the path of an .npz file.

    A known name is returned as it is, unless the data set lies in ``root`` as shards. Raises DataError for anything
    else.
    """
    name = os.fspath(name_or_path)
    if _is_known(name_or_path):
        _check_splits(name, parts)
        shards = None if name == "digits" else _official_shards(name, parts, _roots(root))
        return name if shards is None else shards
    paths = _paths(name, root)
    if paths[0].is_dir():
        return join([_open_folders(paths, part) for part in parts])
    if paths[0].is_file() and paths[0].suffix == ".npz":
        return paths[0]
    raise _unknown(name, paths)


def _load(source: EncodedImages | Path | str, parts: Sequence[str], size: int | None) -> ImageSet:
    if not isinstance(source, str | Path):
        return decode_all(source, size)
    read = load_digits if isinstance(source, str) else partial(load_npz, source)
    images = map(read, parts)
    return concatenate([replace(part, images=resize_images(part.images, size)) for part in images])


def _is_known(name_or_path: str | os.PathLike[str]) -> bool:
    return isinstance(name_or_path, str) and name_or_path in SPLITS


def _paths(name: str, root: Root) -> list[Path]:
    """Return what ``name`` stands for in the folders of ``root``: one path, or several folders of shards.

    Raises DataError if several of the folders hold something that cannot be joined, or only some hold shards.
    """
    paths = without_repeats(_path(name, folder) for folder in root_folders(root) or [""])
    without = [path for path in paths if not path.is_dir() or parquet_folder(path) is None]
    if not without:
        return paths
    if len(without) < len(paths):
        raise _without_shards(name, without[0], next(path for path in paths if path not in without))
    existing = [path for path in paths if path.exists()]
    if len(existing) > 1:
        raise DataError(
            f"{joined_names(existing)} exist, but only folders of parquet shards are joined; name the one to read"
        )
    return existing or paths


def _without_shards(name: str, folder: Path, other: Path) -> DataError:
    return DataError(
        f"{folder} holds no parquet shards of {name}, but {other} does; put shards into it, or omit it from the folders"
    )


def _path(name: str, root: str | os.PathLike[str]) -> Path:
    """Return the path that ``name`` stands for in ``root``, or raise DataError if the system does not accept it."""
    try:
        path = Path(root).expanduser() / Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: "~user" of an unknown user
        raise DataError(f"{name[:100]!r} cannot be looked up as a path: {error}; give another path") from error
    return path


def _roots(root: Root) -> list[Path]:
    folders = [Path(folder).expanduser().absolute() for folder in root_folders(root)]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"{folder} is not a directory; pass one that exists (an empty one receives the download), or none"
            )
    if folders:
        return without_repeats(folders)
    if os.environ.get(ROOT_VARIABLE):
        return [Path(os.environ[ROOT_VARIABLE]).expanduser().absolute()]
    import pooch

    return [Path(pooch.os_cache("rush"))]


def _check_splits(name: str, parts: Sequence[str]) -> None:
    for part in parts:
        if part not in SPLITS[name]:
            raise DataError(f"{name} has no split {part!r}; allowed are {', '.join(SPLITS[name])}")


def _load_official(name: str, parts: Sequence[str], root: Root, download: bool, size: int | None) -> ImageSet:
    _check_splits(name, parts)
    readers, roots = _official_readers(name), _roots(root)
    located = locate(readers, roots, name)
    if located is None:
        shards = _official_shards(name, parts, roots)
        if shards is not None:
            return decode_all(shards, size)
        if not download:
            files = ", ".join(f"{archive.file}, {archive.folder}" for archive in readers)
            verb, these = ("holds", "it") if len(roots) == 1 else ("hold", "them")
            raise DataError(
                f"{joined_names(roots)} {verb} no {name}: searched {these} and "
                f"{joined_names([root / name for root in roots])} for {files} and parquet shards; put one of these "
                f"there, pass another root, set {ROOT_VARIABLE}, or pass download=True"
            )
        if root is not None:
            _refuse_images(roots[0], name)
        preferred = next(iter(readers))
        located = preferred, fetch(preferred.url, f"md5:{preferred.md5}", roots[0] / preferred.file)
    archive, path = located
    return concatenate([readers[archive](path, part, size) for part in parts])


def _refuse_images(folder: Path, name: str) -> None:
    """Raise DataError if images lie where an archive would be downloaded to: they were meant to be read."""
    image = first_image(folder) if folder.is_dir() else None
    if image is not None:
        raise DataError(
            f"{folder} holds images, first {image}, but no {name}; to read them, name the folder instead of {name} "
            f"(in a recipe --set data.name={folder} without --data); to download {name}, give an empty folder"
        )


def _official_readers(name: str) -> dict[Archive, Read]:
    """Return the reader of each official archive of ``name``. The first archive is the one to download."""
    if name == "stl10":
        return {STL10: read_stl10}
    versions = cifar10_versions() if name == "cifar10" else cifar100_versions()
    return {version.archive: partial(read_cifar, name, version) for version in versions}


def _official_shards(name: str, parts: Sequence[str], roots: Sequence[Path]) -> EncodedImages | None:
    """Return the shards of ``name`` in ``roots``.

    The result is None if there are none, or if a folder without shards holds an archive. Raises DataError if the shards
    are of a different data set, or if a folder holds none of the data set.
    """
    shards = {root: parquet_folder(root) or parquet_folder(root / name) for root in roots}
    folders = without_repeats(folder for folder in shards.values() if folder is not None)
    without = [root for root, folder in shards.items() if folder is None]
    if not folders or (without and locate(_official_readers(name), without, name) is not None):
        return None
    if without:
        raise _without_shards(name, without[0], folders[0])
    images = join([open_shards(folders, part, name) for part in parts])
    shape = decode(next(images.read(np.arange(1)))).shape
    if shape != SHAPES[name] or len(images.classes) not in (0, NUM_CLASSES[name]):
        raise DataError(
            f"{joined_names(folders)}: images of shape {shape} in {len(images.classes)} classes, but {name} has "
            f"{SHAPES[name]} in {NUM_CLASSES[name]}; pass the right root, or the folder itself instead of {name!r}"
        )
    return images


def _open_folders(folders: Sequence[Path], split: str) -> EncodedImages:
    shards = without_repeats(shards for shards in map(parquet_folder, folders) if shards is not None)
    if not shards:
        return open_folder(folders[0], split)
    return open_shards(shards, split, folders[0].resolve().name)


def _unknown(name: str, paths: Sequence[Path]) -> DataError:
    allowed = f"allowed are {', '.join(SPLITS)}, a folder of class folders, a folder of parquet shards, or an .npz file"
    path = paths[0]
    if path.exists():
        file = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        return DataError(f"{path} is {file if path.is_file() else describe_kind(path)}; {allowed}")
    close = difflib.get_close_matches(name.lower(), SPLITS, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    places = " or ".join(str(path.absolute()) for path in paths)
    return DataError(f"{name!r} is not a known data set and {places} does not exist; {allowed}{guess}")
