"""Images from folders of class folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rush.data.sources import load_images
from rush.errors import DataError


def pixels(seed: int, channels: int = 3, height: int = 5, width: int = 7) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


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


def test_the_first_image_of_another_size_is_named(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.png"):
        write(tmp_path / name, pixels(0))
    for name in ("a/2.png", "a/3.png"):
        write(tmp_path / name, pixels(0, width=8))
    with pytest.raises(DataError, match=r"a/2\.png is 8x5, but .*a/0\.png is 7x5.*resize or crop"):
        load_images(tmp_path)


def test_transparency_and_16_bits_are_refused(tmp_path: Path) -> None:
    see_through = np.dstack([pixels(0), np.full((5, 7), 255, np.uint8)])
    see_through[2, 3, 3] = 254
    write(tmp_path / "one/a/0.png", see_through)
    with pytest.raises(DataError, match=r"0\.png has transparent pixels"):
        load_images(tmp_path / "one")
    write(tmp_path / "two/a/0.png", pixels(0, 1).astype(np.uint16) * 256)
    with pytest.raises(DataError, match=r"0\.png has mode I;16, allowed are 8-bit"):
        load_images(tmp_path / "two")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a/0.png", pixels(0, height=64, width=64))
    path = tmp_path / f"a/1{suffix}"
    write(path, pixels(1, height=64, width=64))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=rf"1\{suffix} cannot be decoded"):
        load_images(tmp_path)


def test_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty: it holds no image file"):
        load_images(tmp_path)
    write(tmp_path / "cat/0.png", pixels(0))
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="dog is empty"):
        load_images(tmp_path)
