"""Images from .npz files."""

from pathlib import Path

import numpy as np
import pytest

from rush.data.sources import load_images
from rush.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (4, 5, 6), np.uint8)
COLOUR = RNG.integers(0, 256, (4, 5, 6, 3), np.uint8)


def saved(tmp_path: Path, **arrays: object) -> Path:
    np.savez(tmp_path / "mine.npz", **arrays)
    return tmp_path / "mine.npz"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (GREY, GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
    ],
)
def test_the_three_layouts_give_channels_first(tmp_path: Path, stored: np.ndarray, expected: np.ndarray) -> None:
    images = load_images(saved(tmp_path, images=stored))
    assert images.images.numpy().tolist() == expected.tolist()
    assert images.labels is None


def test_an_unnamed_split_serves_any_split_with_its_labels_classes_and_ids(tmp_path: Path) -> None:
    path = saved(
        tmp_path, images=GREY, labels=np.array([2, 0, 1, 2]), classes=["x", "y", "z"], ids=["d", "c", "b", "a"]
    )
    for split in ("train", "test"):
        images = load_images(path, split)
        assert (images.split, images.labels.tolist(), images.classes) == (split, [2, 0, 1, 2], ("x", "y", "z"))
        assert images.ids.tolist() == ["d", "c", "b", "a"]


def test_named_splits_share_their_classes(tmp_path: Path) -> None:
    path = saved(tmp_path, x_train=GREY, y_train=np.array([0, 1, 2, 3]), x_test=GREY[:2], y_test=np.array([[1], [0]]))
    test = load_images(path, "test")
    assert test.labels.tolist() == [1, 0]
    assert test.classes == ("0", "1", "2", "3")
    assert test.ids.tolist() == ["test-00000", "test-00001"]
    with pytest.raises(DataError, match=r"mine\.npz has the arrays.*x_test.*none for split 'val'"):
        load_images(path, "val")


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": GREY.astype(float)}, "images is float64, allowed is uint8"),
        ({"images": GREY[:0]}, "empty"),
        ({"images": RNG.integers(0, 9, (2, 5, 6, 4), np.uint8)}, r"shape \(2, 5, 6, 4\)"),
        ({"images": RNG.integers(0, 9, (2, 3, 6, 3), np.uint8)}, r"shape \(2, 3, 6, 3\)"),
        ({"images": GREY, "labels": np.array([0, 1, 2])}, "3 labels for 4 images"),
        ({"images": GREY, "labels": np.array([0, 1, 2, 9]), "classes": ["a", "b", "c"]}, "row 3 has label 9"),
        ({"images": GREY, "ids": ["a", "b"]}, r"ids has shape \(2,\)"),
        ({"pictures": GREY}, r"\['pictures'\], none for split"),
    ],
)
def test_each_wrong_array_is_named_with_its_file(tmp_path: Path, arrays: dict, text: str) -> None:
    with pytest.raises(DataError, match=rf"mine\.npz.*{text}"):
        load_images(saved(tmp_path, **arrays))


def test_a_truncated_or_damaged_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, images=GREY)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"mine\.npz is truncated"):
        load_images(path)
    middle = content.index(GREY.tobytes()[:20])
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(DataError, match=r"mine\.npz cannot be read: Bad CRC"):
        load_images(path)
