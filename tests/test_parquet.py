"""Images from Hugging Face style parquet shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoded_images import class_names, image_column, png, write_shard
from rush.data.sources import decoded_bytes, load_images
from rush.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)


def write(
    path: Path,
    rows: range,
    labels: list[Any] | None,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = None,
    paths: list[str | None] | None = None,
    contents: list[bytes | None] | None = None,
) -> Path:
    contents = contents or [png(PIXELS[row]) for row in rows]
    columns: dict[str, Any] = {image: image_column(contents, paths or [f"image-{row}.png" for row in rows])}
    if labels is not None:
        columns[label] = labels
    return write_shard(path, columns, None if names is None else class_names(names, label))


@pytest.mark.parametrize("folder", [".", "data"])
@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label")])
def test_shards_are_joined_in_order(tmp_path: Path, folder: str, image: str, label: str) -> None:
    base = tmp_path / folder
    write(base / "train-00001-of-00002.parquet", range(4, 6), [2, 0], image, label, ["a", "b", "c"])
    write(base / "train-00000-of-00002.parquet", range(4), [0, 1, 2, 1], image, label, ["a", "b", "c"])
    write(base / "test-00000-of-00001.parquet", range(1), [0], image, label, ["a", "b", "c"])
    images = load_images(tmp_path, "train")
    assert images.images.numpy().tolist() == PIXELS.transpose(0, 3, 1, 2).tolist()
    assert images.labels.tolist() == [0, 1, 2, 1, 2, 0]
    assert images.classes == ("a", "b", "c")
    assert images.ids.tolist() == [f"image-{row}.png" for row in range(6)]
    assert len(load_images(tmp_path, "test")) == 1


@pytest.mark.parametrize("paths", [["a.png", "a.png", "b.png"], ["a.png", None, "b.png"]])
def test_without_unique_paths_rows_are_the_ids_and_without_names_numbers_the_classes(
    tmp_path: Path, paths: list
) -> None:
    write(tmp_path / "test-00000-of-00001.parquet", range(3), [0, 2, 1], paths=paths)
    images = load_images(tmp_path)
    assert images.ids.tolist() == ["test-00000", "test-00001", "test-00002"]
    assert images.classes == ("0", "1", "2")


def test_no_label_column_means_unlabelled(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001.parquet", range(3), None)
    assert load_images(tmp_path, "train").labels is None


def test_a_known_name_takes_shards_where_there_is_no_archive(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(10)]
    write(tmp_path / "cifar10/test-00000-of-00001.parquet", range(6), list(range(6)), names=names)
    for root in (tmp_path, tmp_path / "cifar10"):
        images = load_images("cifar10", root=root, download=False)
        assert (images.name, images.labels.tolist(), images.num_classes) == ("cifar10", list(range(6)), 10)
    with pytest.raises(DataError, match=r"3, 32, 32\) in 10 classes, but cifar100 has .* in 100"):
        load_images("cifar100", root=tmp_path / "cifar10", download=False)
    with pytest.raises(DataError, match="holds no stl10"):
        load_images("stl10", root=tmp_path, download=False)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "test-00000-of-00001.parquet", range(3), [0, 1, 2])
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet cannot be read"):
        load_images(tmp_path)
    path.write_bytes(content[:40] + bytes(2000) + content[2040:])  # whole footer, damaged pages
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"labels": [0, 1, 3], "names": ["a", "b", "c"]}, r"row 2 has label 3, allowed are 0\.\.2"),
        ({"label": "labels"}, "name its label column"),
        ({"image": "picture"}, "picture: struct.*needs 'img' or 'image'"),
        ({"contents": [png(PIXELS[0]), None, b""]}, "row 1 has no image bytes"),
        ({"contents": [png(PIXELS[0])] * 2 + [png(PIXELS[2])[:-500]]}, "row 2 cannot be decoded"),
        (
            {"contents": [png(PIXELS[0])] * 2 + [png(PIXELS[2, :9])]},
            "row 2 is 32x9, but .*row 0 is 32x32.*resize or crop",
        ),
    ],
)
def test_each_fault_is_named_with_its_shard(tmp_path: Path, options: dict, text: str) -> None:
    write(tmp_path / "test-00000-of-00001.parquet", range(3), **{"labels": [0, 1, 1], **options})
    with pytest.raises(DataError, match=rf"test-00000-of-00001\.parquet.*{text}"):
        load_images(tmp_path)


# Shards in several folders


def spread(base: Path, names: list[str] | None, paths: bool) -> tuple[Path, Path, Path]:
    """Four shards of a split and one of another: in one folder, and divided over two, every second one in each."""
    whole, first, second = base / "whole", base / "a", base / "b"
    for number in range(4):
        rows, labels = range(number, number + 2), [number % 3, (number + 1) % 3]
        names_of_files = [f"{number}-{row}.png" for row in rows] if paths else ["same.png"] * 2
        for folder in (whole, (first, second)[number % 2]):
            write(folder / f"train-{9 + number}.parquet", rows, labels, names=names, paths=names_of_files)
    for folder in (whole, second):
        write(folder / "test.parquet", range(2), [0, 3], names=names)
    return whole, first, second


@pytest.mark.parametrize("order", [1, -1], ids=["a, b", "b, a"])
@pytest.mark.parametrize("names", [None, ["a", "b", "c", "d"]], ids=["numbered", "named"])
@pytest.mark.parametrize("paths", [True, False], ids=["paths", "rows"])
def test_shards_in_several_folders_are_those_of_one(
    tmp_path: Path, names: list[str] | None, paths: bool, order: int
) -> None:
    """The shards 9 and 11 lie in one folder, 10 and 12 in the other; the largest label only in a test shard."""
    whole, *folders = spread(tmp_path, names, paths)
    joined, alone = (load_images(".", "train", root=root) for root in (folders[::order], whole))
    assert joined.fingerprint == alone.fingerprint
    assert joined.images.equal(alone.images)
    assert joined.ids.tolist() == alone.ids.tolist()
    assert (joined.classes, joined.num_classes) == (alone.classes, 4)
    assert joined.images[:, :, 0, 0].tolist() == [PIXELS[row, 0, 0].tolist() for row in (0, 1, 1, 2, 2, 3, 3, 4)]
    assert decoded_bytes(".", "train", folders[::order]) == joined.images.numel()
    both = load_images(".", "train+test", root=folders)
    assert both.fingerprint == load_images(".", "train+test", root=whole).fingerprint


def test_a_known_name_and_a_relative_one_are_joined_too(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(10)]
    first, second = tmp_path / "a", tmp_path / "b"
    write(first / "cifar10/test-00000-of-00002.parquet", range(2), [0, 1], names=names)
    write(second / "data/test-00001-of-00002.parquet", range(2, 6), [2, 3, 4, 5], names=names)
    images = load_images("cifar10", root=[second, str(first)], download=False)
    assert (images.name, images.labels.tolist()) == ("cifar10", list(range(6)))
    write(second / "cifar10/test-00001-of-00002.parquet", range(2, 6), [2, 3, 4, 5], names=names)
    relative = load_images("cifar10/.", root=(first, second))
    assert (relative.name, relative.fingerprint) == ("cifar10", images.fingerprint)


def test_one_folder_given_twice_or_by_an_absolute_name_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write(folder / "test.parquet", range(3), [0, 1, 2])
    (tmp_path / "link").symlink_to(folder)
    expected = load_images(folder).fingerprint
    assert load_images(".", root=[folder, tmp_path / "link"]).fingerprint == expected
    assert load_images(folder, root=[tmp_path, tmp_path / "link"]).fingerprint == expected


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_missing_shard_is_named_with_the_folders(tmp_path: Path, names: str) -> None:
    folders = [tmp_path / name for name in names]
    write(folders[0] / "train-00000-of-00003.parquet", range(2), [0, 1])
    write(folders[-1] / "train-00002-of-00003.parquet", range(2), [0, 1])
    where = " and ".join(map(str, folders))
    with pytest.raises(DataError, match=rf"train-00001-of-00003\.parquet is missing \(1 of the 3.* in {where}; "):
        load_images(".", "train", root=folders)
    with pytest.raises(DataError, match=rf"{where}: no shard test-\*\.parquet, only of train"):
        load_images(".", "test", root=folders)


@pytest.mark.parametrize(
    ("name", "other", "text"),
    [
        ("train-00000-of-00001", "train-00000-of-00001", r"parquet lies in {a} and in {b}; remove one"),
        ("train", "train", r"train\.parquet lies in {a} and in {b}; remove one"),
        ("train-00000-of-00001", "train-00000-of-00002", r"of several series: {a}/.*, {b}/"),
        ("train-00000-of-00001", "train", r"of several series: {b}/train.parquet, {a}/"),
        ("train-00000-of-00001", None, "{b} holds no parquet shards of .*, but {a} does"),
    ],
)
def test_shards_of_two_folders_that_do_not_make_one_set_are_refused(
    tmp_path: Path, name: str, other: str | None, text: str
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write(first / f"{name}.parquet", range(2), [0, 1])
    second.mkdir()
    if other:
        write(second / f"{other}.parquet", range(2), [0, 1])
    for name in (".", "cifar10"):
        with pytest.raises(DataError, match=text.format(a=first, b=second)):
            load_images(name, "train", root=[first, second])


def test_other_class_names_in_another_folder_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write(first / "train-00000-of-00002.parquet", range(2), [0, 1], names=["a", "b"])
    write(second / "train-00001-of-00002.parquet", range(2), [0, 1], names=["b", "a"])
    with pytest.raises(
        DataError, match=rf"{second}/train-.* has a different label column or different classes from {first}/"
    ):
        load_images(".", "train", root=[first, second])
    write(second / "train-00001-of-00002.parquet", range(2), [0, 1], names=["a", "b"])
    write(second / "test.parquet", range(2), [0, 1], names=["b", "a"])
    with pytest.raises(DataError, match=rf"{second}/test.parquet names the classes .*, {first}/train-"):
        load_images(".", "train", root=[first, second])
