"""Images from folders of class folders."""

import os
import shutil
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoded_images import image_column, png, write_shard
from rush.data.sources import load_images
from rush.data.streaming import open_stream
from rush.errors import DataError, DataWarning


def pixels(seed: int, channels: int = 3, height: int = 5, width: int = 7) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    (image.convert(mode) if mode else image).save(path, **lossless, **options)


def loaded(folder: Path, suffix: str, array: np.ndarray, mode: str | None = None, **options: Any) -> np.ndarray:
    """The pixels (H, W, C) as loaded of an image that both classes of ``folder`` hold, in files with ``suffix``."""
    for name in "ab":
        write(folder / name / f"x{suffix}", array, mode, **options)
    return load_images(folder).images[1].numpy().transpose(1, 2, 0)


def test_pixels_labels_and_ids_of_lossless_formats(tmp_path: Path) -> None:
    write(tmp_path / "pets/dog/a.png", pixels(0))
    write(tmp_path / "pets/cat/deep/b.webp", pixels(1))
    write(tmp_path / "pets/cat/a.bmp", pixels(2))
    (tmp_path / "pets/cat/notes.txt").write_text("not an image")
    images = load_images(tmp_path / "pets", "train")
    assert images.classes == ("cat", "dog")
    assert images.ids.tolist() == ["cat/a.bmp", "cat/deep/b.webp", "dog/a.png"]
    assert images.labels.tolist() == [0, 0, 1]
    expected = np.stack([pixels(seed).transpose(2, 0, 1) for seed in (2, 1, 0)])
    assert images.images.numpy().tolist() == expected.tolist()
    assert images.name == "pets"


def test_splits_share_their_classes_even_where_one_lacks_a_class(tmp_path: Path) -> None:
    for name in ("train/ant/0.png", "train/bee/1.png", "train/cow/2.png", "test/cow/3.png", "test/bee/4.png"):
        write(tmp_path / name, pixels(0))
    write(tmp_path / "unlabeled/9.png", pixels(9))
    test = load_images(tmp_path, "test")
    assert test.classes == ("ant", "bee", "cow")
    assert dict(zip(test.ids, test.labels.tolist(), strict=True)) == {"test/bee/4.png": 1, "test/cow/3.png": 2}
    assert load_images(tmp_path, "unlabeled").labels is None
    with pytest.raises(DataError, match="no split 'val', only train, test, unlabeled"):
        load_images(tmp_path, "val")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path / "train/0.png", pixels(0))
    write(tmp_path / "bus/0.png", pixels(0))
    assert load_images(tmp_path, "test").classes == ("bus", "train")


def test_all_greyscale_stays_one_channel_and_any_colour_makes_three(tmp_path: Path) -> None:
    write(tmp_path / "0.png", pixels(0, 1))
    write(tmp_path / "1.png", pixels(1, 1))
    assert load_images(tmp_path).images[:, 0].tolist() == [pixels(0, 1).tolist(), pixels(1, 1).tolist()]
    write(tmp_path / "2.png", pixels(2))
    write(tmp_path / "3.png", pixels(3, 1))
    images = load_images(tmp_path).images
    for row, seed in ((0, 0), (1, 1), (3, 3)):
        assert images[row].tolist() == [pixels(seed, 1).tolist()] * 3
    assert images[2].tolist() == pixels(2).transpose(2, 0, 1).tolist()


def test_palettes_bitmaps_and_opaque_alpha_lose_nothing(tmp_path: Path) -> None:
    flat = np.zeros((4, 4, 3), np.uint8)
    flat[:2] = (200, 30, 90)
    write(tmp_path / "0.png", flat, "RGBA")
    Image.fromarray(flat).quantize(2).save(tmp_path / "1.png")
    write(tmp_path / "2.png", np.array([[0, 255, 0, 255]] * 4, np.uint8), "1")
    images = load_images(tmp_path).images
    assert images[0].tolist() == images[1].tolist() == flat.transpose(2, 0, 1).tolist()
    assert images[2].tolist() == [[[0, 255, 0, 255]] * 4] * 3


def test_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty: it holds no image file"):
        load_images(tmp_path)
    write(tmp_path / "cat/0.png", pixels(0))
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="dog is empty"):
        load_images(tmp_path)


def divided(base: Path, train: str = "train", test: str = "test") -> Path:
    """Two splits of the classes a and b with four images each."""
    for number in range(16):
        write(base / (train, test)[number // 8] / "ab"[number // 4 % 2] / f"{number % 4}.png", pixels(number))
    return base


@pytest.mark.parametrize(
    "place",
    [
        "train/a/.ipynb_checkpoints/0-checkpoint.png",
        "train/a/@eaDir/0.png",
        "train/a/__MACOSX/._0.png",
        "train/__MACOSX/a/0.png",
        "__MACOSX/train/a/0.png",
        "train/a/._0.png",
        "train/a/.hidden.png",
        ".git/a/0.png",
        "train/.cache/0.png",
        "train/a/#recycle/0.png",
        "train/a/deep/.thumbs/0.png",
    ],
)
def test_hidden_entries_and_those_of_the_system_are_no_part_of_the_set(place: str, tmp_path: Path) -> None:
    write(divided(tmp_path) / place, pixels(99))
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / "train/a" / name).write_bytes(b"x")
    images = load_images(tmp_path, "train")
    assert images.ids.tolist() == [f"train/{name}/{number}.png" for name in "ab" for number in range(4)]
    assert images.classes == ("a", "b")
    assert len(open_stream(tmp_path, "train")) == 8


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(suffix, "RGB") for suffix in (".png", ".PNG", ".webp", ".bmp", ".ppm", ".pnm", ".tif", ".TIFF")]
    + [(".pgm", "L"), (".pbm", "1"), (".gif", "P")],
)
def test_every_lossless_format_is_read_to_the_pixel(suffix: str, mode: str, tmp_path: Path) -> None:
    expected = np.asarray(Image.fromarray(pixels(0)).convert(mode).convert({"1": "L", "P": "RGB"}.get(mode, mode)))
    assert loaded(tmp_path, suffix, pixels(0), mode).squeeze().tolist() == expected.tolist()


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".jpe", ".jfif", ".JFIF"])
def test_every_name_of_a_jpeg_is_one(suffix: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, suffix, pixels(0), format="JPEG").shape == (5, 7, 3)


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for number in range(3):
        write(elsewhere / f"{number}.png", pixels(number))
    base = divided(tmp_path / "set")
    (base / "train/a/more").symlink_to(elsewhere)
    (base / "train/c").mkdir()
    (base / "train/c/link.png").symlink_to(tmp_path / "other.png")
    write(tmp_path / "other.png", pixels(7))
    images = load_images(base, "train")
    assert [name for name in images.ids if "more" in name] == [f"train/a/more/{number}.png" for number in range(3)]
    assert images.images[-1].tolist() == pixels(7).transpose(2, 0, 1).tolist()
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("train", "test"):
        (linked / name).symlink_to(base / name)
    assert load_images(linked, "train").ids.tolist() == images.ids.tolist()


LINKS: dict[str, tuple[str, str, str]] = {
    "to the folder itself": ("train/a/loop", "train/a", "is a link to a folder above it"),
    "to the split": ("train/a/loop", "train", "is a link to a folder above it"),
    "to the set": ("train/b/deep", ".", "is a link to a folder above it"),
    "to an image": ("train/a/again.png", "train/a/0.png", "are the same file by a link"),
    "to an image of another class": ("train/b/again.png", "train/a/0.png", "are the same file by a link"),
    "to a class as a class": ("train/c", "train/a", "are the same file by a link"),
    "to a class in a class": ("train/a/more", "train/b", "are the same file by a link"),
    "to nothing": ("train/a/x.png", "nowhere.png", "is a broken link, not an image file"),
    "to a device": ("train/a/x.png", "/dev/zero", "is a pipe, socket or device, not an image file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_counts_an_image_twice_or_leads_nowhere_is_named(name: str, tmp_path: Path) -> None:
    place, target, text = LINKS[name]
    (divided(tmp_path) / place).symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=text) as caught:
        load_images(tmp_path, "train")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.timeout(60)
def test_a_pipe_is_named_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(divided(tmp_path) / "train/a/pipe")
    with pytest.warns(DataWarning, match=r"1 entries are omitted.*1 with no suffix.*train/a/pipe"):
        assert len(load_images(tmp_path, "train")) == 8
    os.mkfifo(tmp_path / "train/a/pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is a pipe, socket or device, not an image file"):
        load_images(tmp_path, "train")


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("Training", "test"), ("train", "Testing")],
)
def test_splits_are_known_by_their_names_in_any_case(train: str, test: str, tmp_path: Path) -> None:
    divided(tmp_path, train, test)
    images = load_images(tmp_path, "test")
    assert images.classes == ("a", "b")
    assert images.ids.tolist() == [f"{test}/{name}/{number}.png" for name in "ab" for number in range(4)]
    assert len(load_images(tmp_path, "train+test")) == 16


@pytest.mark.parametrize("names", [("val", "validation"), ("valid", "val"), ("Val", "VALID")])
def test_two_folders_of_one_split_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    divided(tmp_path, *names)
    with pytest.raises(DataError, match="which are one split"):
        load_images(tmp_path, "val")


@pytest.mark.parametrize(
    "names", [("train2017", "val2017"), ("train_set", "test_set"), ("images_train", "images_test"), ("eval", "dev")]
)
def test_folders_that_look_like_splits_are_no_classes(names: tuple[str, str], tmp_path: Path) -> None:
    divided(tmp_path, *names)
    with pytest.raises(DataError, match="looks like a split, not like a class; name it train"):
        load_images(tmp_path, "train")


def test_splits_of_images_alone_have_no_labels(tmp_path: Path) -> None:
    for name in ("train/0.png", "test/1.png"):
        write(tmp_path / name, pixels(0))
    assert load_images(tmp_path, "train").ids.tolist() == ["train/0.png"]
    assert load_images(tmp_path, "test").labels is None


@pytest.mark.parametrize("place", ["test/0.png", "unlabeled/all/0.png"], ids=["images alone", "unlabeled"])
def test_a_split_without_classes_beside_one_that_has_some_has_no_labels(place: str, tmp_path: Path) -> None:
    write(divided(tmp_path, "train", "val") / place, pixels(0))
    assert load_images(tmp_path, place.partition("/")[0]).labels is None
    assert load_images(tmp_path, "train").classes == ("a", "b")
    assert load_images(tmp_path, f"train+{place.partition('/')[0]}").ids[-1] == place


@pytest.mark.parametrize("place", ["train/stray.png", "stray.jpg", "train/stray.GIF"])
def test_an_image_beside_the_class_folders_is_named(place: str, tmp_path: Path) -> None:
    (divided(tmp_path) / place).write_bytes(b"")
    with pytest.raises(DataError, match=r"stray\.\w+ lies beside the folders .*its class is not known"):
        load_images(tmp_path, "train")


@pytest.mark.parametrize("suffix", [".heic", ".AVIF", ".svg", ".jp2", ".psd", ".CR2"])
def test_an_image_of_a_format_that_is_not_read_is_named(suffix: str, tmp_path: Path) -> None:
    (divided(tmp_path) / f"train/a/x{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match=rf"x\{suffix} is an image of a format that is not read; convert it"):
        load_images(tmp_path, "train")


def test_what_else_lies_there_is_counted_in_one_warning(tmp_path: Path) -> None:
    base = divided(tmp_path)
    for place in ("train/a/x.bak", "train/b/y.bak", "train/z.zip", "points.npz", "train/a/noname"):
        (base / place).write_bytes(b"")
    write(base / "extra/c/0.png", pixels(0))
    with pytest.warns(DataWarning) as caught:
        images = load_images(base, "train")
    assert len(images) == 8
    (text,) = [str(warning.message) for warning in caught]
    assert "6 entries are omitted" in text
    assert "2 with .bak" in text
    assert str(base) in text


def test_notes_are_omitted_without_a_word(tmp_path: Path) -> None:
    base = divided(tmp_path)
    for place in ("train/a/notes.txt", "README.md", "train/labels.csv", "LICENSE"):
        (base / place).write_text("x")
    assert len(load_images(base, "train")) == 8


def test_what_lies_beside_shards_is_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", {"image": image_column([png(pixels(0))] * 2), "label": [0, 1]})
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "._train-0.parquet").write_text("x")
    assert len(load_images(tmp_path, "train")) == 2
    for name in ("train-1.parquet.tmp", "more.npz", "sub"):
        (tmp_path / name).mkdir()
    with pytest.warns(DataWarning, match="3 entries are omitted because they are not parquet shards"):
        load_images(tmp_path, "train")


def test_class_folders_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"train/{number}/x.png", pixels(number))
        if number > 8:
            write(tmp_path / f"test/{number}/x.png", pixels(number))
    images = load_images(tmp_path, "train")
    assert images.classes == tuple(map(str, range(12)))
    assert images.ids.tolist() == [f"train/{number}/x.png" for number in range(12)]
    assert images.labels.tolist() == list(range(12))
    assert load_images(tmp_path, "test").labels.tolist() == [9, 10, 11]
    write(tmp_path / "train/ten/x.png", pixels(0))
    assert load_images(tmp_path, "train").classes[:4] == ("0", "1", "10", "11")


@pytest.mark.parametrize(
    ("first", "second"),
    [("Cat", "cat"), ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")), ("stra\u00dfe", "STRASSE"), ("a", "a ")],
)
def test_classes_that_differ_in_case_or_encoding_alone_are_refused(first: str, second: str, tmp_path: Path) -> None:
    for place in (f"train/{first}/0.png", f"test/{second}/1.png", "train/dog/2.png"):
        write(tmp_path / place, pixels(0))
    with pytest.raises(DataError, match="differ in upper and lower case or in encoding alone"):
        load_images(tmp_path, "train")


@pytest.mark.parametrize("load", [load_images, open_stream])
def test_one_class_only_is_refused_and_one_left_by_a_choice_is_not(load: Callable, tmp_path: Path) -> None:
    write(tmp_path / "one/cat/0.png", pixels(0))
    with pytest.raises(DataError, match=r"all 1 images have the class 'cat'; a classifier needs at least two"):
        load(tmp_path / "one", "train")
    divided(tmp_path / "two")
    write(tmp_path / "two/test/c/0.png", pixels(0))
    shutil.rmtree(tmp_path / "two/train/b")
    with pytest.raises(DataError, match=r"\(train\): all 4 images have the class 'a'"):
        load(tmp_path / "two", "train")
    chosen = load_images(tmp_path / "two", "test")[[0, 1]]
    assert chosen.labels.tolist() == [0, 0]


ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_orientation_of_the_camera_is_applied_once(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    expected = ORIENTATIONS[orientation](pixels(0))
    assert loaded(tmp_path, suffix, pixels(0), exif=exif).tolist() == expected.tolist()


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"MM" * 50])
def test_exif_data_that_cannot_be_read_are_ignored(exif: bytes, tmp_path: Path) -> None:
    assert loaded(tmp_path, ".png", pixels(0), exif=exif).tolist() == pixels(0).tolist()


def test_large_pictures_that_are_read_give_no_warning_of_pillows(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("1", (8192, 8192)).save(tmp_path / name / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_images(tmp_path, size=4).images.shape == (2, 1, 4, 4)
