"""``rush init``: a recipe for one's own images."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rush.commands.run_folders import data_roots
from rush.commands.terminal import print_lines
from rush.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from rush.data.images import ImageSet
    from rush.data.readers.encoded import EncodedImages

_VIEWS = 1_000_000  # images over all epochs of pre-training: 20 epochs of 50,000
_NOISY = 300_000  # and of fine-tuning
_EPOCHS = (20, 200), (6, 60)  # the fewest and the most of each
_OTHERS = "test", "unlabeled"  # splits besides the training images
_SAMPLED = 64  # images whose size is inspected
_LARGEST_SIDE = 96  # above it images are resampled, which keeps training within hours on a CPU
_SIDE = 64
_TEST_SHARE, _MOST_TEST = 0.2, 2000
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 5000
_CERTIFIED, _ATTACKED = 200, 60  # images; an audit of fewer than 59 cannot end with "holds"


@dataclass(frozen=True)
class Survey:
    """The images at a place, as far as a recipe depends on them.

    Attributes:
        train: number of training images, of all images if there is no test split.
        test: number of images of the test split, None if there is none.
        unlabeled: number of images without labels in a split of their own.
        classes: number of classes.
        size: (height, width) of the images, None if the sampled ones differ.
    """

    train: int
    test: int | None
    unlabeled: int
    classes: int
    size: tuple[int, int] | None


def init(file: Path, *, data: str, root: list[Path] | None = None, base: str = "cifar10-small") -> None:
    """Write a recipe for a folder of one's own images, with comments: sizes, splits and batches that fit them.

    Args:
        file: The recipe, a new .toml file.
        data: Images: a folder of class folders or of parquet shards, an .npz file, or the name of a data set.
        root: Folder with the archives or shards of the data set; repeatable, shards of all folders are joined.
        base: Recipe that gives everything else.
    """
    if file.suffix != ".toml":
        raise ConfigError(f"{file} must end in .toml, as `rush run` reads it")
    if file.exists():
        raise RunError(f"{file} exists; give the name of a new file")
    from rush.recipe.load import load_recipe, recipe_text
    from rush.runtime.files import write_text

    recipe_text(base)  # refuses an unknown one before the images are read
    place = os.path.abspath(data) if Path(data).exists() else data
    survey = look_at(place, data_roots(root))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("._-") or "mine"
    write_text(file, text_for(name, file.name, place, survey, base))
    load_recipe(str(file))
    options = "".join(f" --data {folder}" for folder in root or ())
    lines = [f"written to {file}", f"rush cost {file}{options}    # how long it takes here"]
    print_lines([*lines, f"rush run {file}{options}     # everything, to runs/{name}/report.html"])


def look_at(data: str, root: str | list[str] | None) -> Survey:
    """Return what a recipe needs to know about the images.

    Raises:
        DataError: There are none, none with labels, or one class only.
    """
    from rush.data.sources import is_divided, load_images, open_encoded, split_or_none

    train = open_encoded(data, "train", root) or load_images(data, "train", root)
    if train.labels is None:
        raise DataError(f"{data} has no labels for its training images; a classifier needs some")
    if len(train.classes) < 2:
        raise DataError(f"all images of {data} are of the class {train.classes[0]!r}; a classifier needs at least two")
    others = [split_or_none(data, split, root) for split in _OTHERS] if is_divided(data, root) else [None, None]
    test, unlabeled = (None if images is None else len(images) for images in others)
    return Survey(len(train), test, unlabeled or 0, len(train.classes), _size(train))


def text_for(name: str, file: str, data: str, survey: Survey, base: str) -> str:
    """Return the recipe ``name`` for ``file`` as TOML with comments."""
    drawn = 0 if survey.test is not None else min(_MOST_TEST, max(1, round(_TEST_SHARE * survey.train)))
    rest = survey.train - drawn
    held_out = min(_MOST_HELD_OUT, round(_HELD_OUT_SHARE * rest)) if rest >= 10 * survey.classes else 0
    trained = rest - held_out
    pretrained = trained + survey.unlabeled
    resized = survey.size is None or survey.size[0] != survey.size[1] or survey.size[0] > _LARGEST_SIDE
    tested = drawn if survey.test is None else survey.test
    (least, most), (few, many) = _EPOCHS
    lines = [
        f"# {survey.train:,} labelled images, {survey.classes} classes"
        + (f", {survey.unlabeled:,} images without labels" if survey.unlabeled else ""),
        f"# command: rush run {file}",
        f"base = {json.dumps(base)}  # gives what is not set here; `rush recipes show {file}` prints all",
        f"name = {json.dumps(name)}",
        "",
        "[data]",
        f"name = {json.dumps(data)}",
        *([f"size = {_SIDE}  # the central square of each image is resampled to this side"] if resized else []),
        *([f"test_images = {drawn}  # drawn from the training images, which have no test split"] if drawn else []),
        f"held_out = {held_out}  # training images that monitor training and are never trained on",
        *(['pretrain_split = "train+unlabeled"  # pre-training needs no labels'] if survey.unlabeled else []),
        "",
        "[smoothing]",
        "sigma = 0.25  # of the noise: larger proves larger radii at a lower accuracy",
        "",
        "[pretrain]",
        f"epochs = {_within(_VIEWS // pretrained, least, most)}",
        f"batch_size = {_batch(pretrained, 256)}",
        "",
        *(["[teach]", "rounds = 1  # the encoder labels the images without labels", ""] if survey.unlabeled else []),
        "[finetune]",
        f"epochs = {_within(_NOISY // (pretrained if survey.unlabeled else trained), few, many)}",
        f"batch_size = {_batch(trained, 128)}",
        "",
        "[certify]",
        f"images = {min(_CERTIFIED, tested)}  # of the test images",
        'method = "sequential"  # each image is sampled until its radii are decided',
        "",
        "[attack]",
        f"images = {min(_ATTACKED, tested)}  # each takes many thousand passes; fewer than 59 do not decide an audit",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _size(images: EncodedImages | ImageSet) -> tuple[int, int] | None:
    """Return the size (height, width) that a sample of the images has, or None if it has several."""
    import numpy as np

    from rush.data.images import ImageSet
    from rush.data.readers.decoding import decode

    if isinstance(images, ImageSet):
        return images.shape[1:]
    rows = np.unique(np.linspace(0, len(images) - 1, _SAMPLED).astype(int))
    sizes = {decode(encoded).shape[1:] for encoded in images.read(rows)}
    return sizes.pop() if len(sizes) == 1 else None


def _within(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))


def _batch(images: int, most: int) -> int:
    """Return the largest power of two up to ``most`` with which the images fill four batches, but at least two."""
    return max(2, min(most, 1 << max(1, (images // 4).bit_length() - 1)))
