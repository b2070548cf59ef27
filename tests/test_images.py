"""ImageSet keeps pixels, labels and ids together, and refuses what is not one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rush.data.images import ImageSet, concatenate, hold_out, stratified_subset
from rush.errors import DataError, InputError
from rush.runtime.randomness import stream


def numbered(n: int = 6, labels: list[int] | None = None, classes: int = 3) -> ImageSet:
    """Image i is filled with the value 10 i, so that its pixels identify a row."""
    images = (torch.arange(n) * 10 % 256).to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).clone()
    y = torch.tensor(labels if labels is not None else [i % classes for i in range(n)])
    return ImageSet(images, y, tuple("abcdefghij"[:classes]), np.array([f"id-{i}" for i in range(n)]), "set", "test")


def rows_of(images: ImageSet) -> list[int]:
    return [int(name.removeprefix("id-")) for name in images.ids]


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, -2), [5, 3, 1]),
        ([4, 0, -1], [4, 0, 5]),
        (np.array([2, 1]), [2, 1]),
        (torch.tensor([3, 5]), [3, 5]),
        (range(2, 4), [2, 3]),
        (np.array([True, False, False, True, False, False]), [0, 3]),
        (torch.tensor([False, False, True, False, False, True]), [2, 5]),
        ([True, False, False, False, False, True], [0, 5]),
    ],
)
def test_every_index_keeps_pixels_labels_and_ids_of_the_same_rows(index: object, rows: list[int]) -> None:
    chosen = numbered()[index]
    assert chosen.images[:, 0, 0, 0].tolist() == [10 * row for row in rows]
    assert chosen.labels.tolist() == [row % 3 for row in rows]
    assert rows_of(chosen) == rows
    assert len(chosen) == len(rows)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (3, r"images\[i : i \+ 1\]"),
        ([6], r"-6\.\.5 for 6 images, got 6\.\.6"),
        ([-7], r"got -7\.\.-7"),
        ([0.5], "float64"),
        ([], "non-empty"),
        (slice(4, 4), "selects none of 6"),
        ([True, False], "must have 6 entries and select at least one, got 2"),
        (np.zeros(6, bool), "got 6 with 0 true"),
    ],
)
def test_a_wrong_index_is_named(index: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        numbered()[index]


def test_pixels_are_the_division_by_255_to_the_last_bit() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = ImageSet(every, None, (), np.array(["a"]), "set", "test")
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    assert images.pixels().flatten().tolist() == expected.tolist()
    assert images.pixels().equal(every.float() / 255)
    assert numbered().pixels([4, 1])[:, 0, 0, 0].tolist() == [
        np.float32(40) / np.float32(255),
        np.float32(10) / np.float32(255),
    ]


def test_fingerprint_changes_with_each_part_it_covers_and_with_nothing_else() -> None:
    images = numbered()
    pixels = images.images.clone()
    pixels[5, 0, 1, 1] += 1
    others = [
        replace(images, images=pixels),
        replace(images, images=images.images.reshape(6, 1, 1, 4)),
        replace(images, labels=torch.tensor([0, 1, 2, 0, 1, 1])),
        replace(images, ids=np.array([f"id-{i}" for i in (0, 1, 2, 3, 4, 6)])),
        images.without_labels(),
        images[:5],
    ]
    assert len({other.fingerprint for other in others} | {images.fingerprint}) == 7
    assert replace(images, name="other", classes=("x", "y", "z")).fingerprint == images.fingerprint
    assert images[[1, 0, 2]][[1, 0, 2]].fingerprint == images[:3].fingerprint


def test_without_labels_drops_the_labels_alone() -> None:
    images = numbered()
    bare = images.without_labels()
    assert bare.labels is None
    assert bare[2:4].labels is None
    assert bare.images.equal(images.images)
    assert bare.num_classes == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": torch.zeros(6, 1, 2, 2)}, r"torch\.uint8 tensor \(N, C, H, W\).*torch\.float32 \(6, 1, 2, 2\)"),
        ({"images": torch.zeros(6, 2, 2, dtype=torch.uint8)}, r"got torch\.uint8 \(6, 2, 2\)"),
        ({"images": np.zeros((6, 1, 2, 2), np.uint8)}, "got ndarray"),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8)}, "empty"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "5 labels for 6 images"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, r"torch\.int64 tensor.*got torch\.int32"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 0])}, r"row 3 has label 3, allowed are 0\.\.2; 2 of 6 labels"),
        ({"labels": torch.tensor([0, -1, 2, 0, 1, 0])}, "row 1 has label -1"),
        ({"ids": np.array(["a", "b", "a", "c", "d", "e"])}, "'a' occurs 2 times"),
        ({"ids": np.arange(6)}, r"array of str of shape \(6,\), got int64"),
        ({"ids": np.array(["a"])}, r"\(1,\)"),
        ({"classes": ["a", "b", "c"]}, "tuple of distinct names"),
        ({"classes": ("a", "b", "a")}, "tuple of distinct names"),
    ],
)
def test_what_is_not_an_image_set_is_refused_with_its_name_and_what_was_given(change: dict, text: str) -> None:
    with pytest.raises(DataError, match=f"set/test: .*{text}"):
        replace(numbered(), **change)


def test_stratified_subset_of_balanced_classes_differs_by_at_most_one() -> None:
    images = numbered(60, classes=10)
    for size in (10, 17, 25, 59, 60):
        counts = np.bincount(stratified_subset(images, size, stream(0, "a")).labels.numpy(), minlength=10)
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 1


def test_stratified_subset_keeps_shares_and_gives_every_class_at_least_one() -> None:
    images = numbered(100, labels=[0] * 80 + [1] * 18 + [2] * 2)
    for size, counts in ((0.5, [40, 9, 1]), (10, [8, 1, 1]), (3, [1, 1, 1])):
        assert np.bincount(stratified_subset(images, size, stream(0, "a")).labels.numpy()).tolist() == counts


def test_stratified_subset_follows_its_generator_and_keeps_the_order() -> None:
    images = numbered(60, classes=10)
    first, again = (stratified_subset(images, 20, stream(7, "subset")) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    # The same subset by chance: (1 / C(6, 2)) ** 10, below 1e-11.
    assert first.ids.tolist() != stratified_subset(images, 20, stream(8, "subset")).ids.tolist()
    rows = rows_of(first)
    assert rows == sorted(rows)
    assert first.labels.tolist() == [row % 10 for row in rows]


@pytest.mark.parametrize("size", [0, 7, 2, 0.0, 1.5, 0.1, True, "3"])
def test_an_impossible_subset_is_refused(size: object) -> None:
    with pytest.raises(InputError, match=r"subset size must be|fewer than the 3 classes"):
        stratified_subset(numbered(), size, stream(0, "a"))


def test_a_subset_needs_labels_and_a_generator() -> None:
    with pytest.raises(InputError, match="has no labels"):
        stratified_subset(numbered().without_labels(), 3, stream(0, "a"))
    with pytest.raises(InputError, match=r"torch\.Generator"):
        stratified_subset(numbered(), 3, None)


def test_held_out_images_and_the_rest_are_the_set_and_classes_give_their_share() -> None:
    images = numbered(100, labels=[0] * 69 + [1] * 30 + [2])
    rest, held = hold_out(images, 10, stream(0, "held"))
    assert np.bincount(held.labels.numpy(), minlength=3).tolist() == [7, 3, 0]
    for part in (rest, held):
        assert rows_of(part) == sorted(rows_of(part))
    assert sorted(rows_of(rest) + rows_of(held)) == list(range(100))
    assert hold_out(images, 10, stream(0, "held"))[1].fingerprint == held.fingerprint
    # The same ten by chance: 1 / (C(69, 7) C(30, 3)), below 1e-12.
    assert hold_out(images, 10, stream(1, "held"))[1].ids.tolist() != held.ids.tolist()


def test_without_labels_all_images_are_held_out_alike() -> None:
    images = numbered(100, labels=[0] * 50 + [1] * 50, classes=2).without_labels()
    rest, held = hold_out(images, 30, stream(0, "held"))
    assert (len(rest), len(held)) == (70, 30)
    assert not set(rest.ids) & set(held.ids)
    drawn = np.zeros(100)
    for seed in range(300):
        drawn[rows_of(hold_out(images, 30, stream(seed, "held"))[1])] += 1
    # Each is drawn 90 times on average with a standard deviation of 7.9; six of them are exceeded with odds < 1e-6.
    assert np.abs(drawn - 90).max() < 6 * 7.94


@pytest.mark.parametrize("count", [0, 6, -1, 2.0, True])
def test_an_impossible_number_of_held_out_images_is_refused(count: object) -> None:
    with pytest.raises(InputError, match=r"to hold out must be in 1\.\.5 of 6, got"):
        hold_out(numbered(), count, stream(0, "held"))


def test_splits_are_joined_with_ids_that_stay_unique() -> None:
    train = replace(numbered(4), split="train")
    other = replace(numbered(6)[4:], split="unlabeled", labels=None, classes=())
    both = concatenate([train, other])
    assert both.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert (both.labels, both.classes, both.split) == (None, ("a", "b", "c"), "train+unlabeled")
    assert both.ids.tolist() == [f"id-{row}" for row in range(6)]
    again = concatenate([train, replace(numbered(6)[2:4], split="test")])
    assert again.ids.tolist() == [*(f"train/id-{row}" for row in range(4)), "test/id-2", "test/id-3"]
    assert again.labels.tolist() == [0, 1, 2, 0, 2, 0]
    colour = replace(other, images=other.images.repeat(1, 3, 1, 1))
    assert concatenate([train, colour]).images[1].unique().tolist() == [10]
    assert concatenate([train]) is train


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"classes": ("a", "c")}, "the parts have the classes"),
        ({"images": torch.zeros(6, 1, 4, 4, dtype=torch.uint8)}, r"\[\(2, 2\), \(4, 4\)\].*give size"),
        ({"split": "other"}, "split 'other' holds the images of another part"),
    ],
)
def test_what_does_not_belong_together_is_not_joined(change: dict, text: str) -> None:
    fields = {"labels": None, "ids": np.array([f"x{row}" for row in range(6)]), **change}
    with pytest.raises(DataError, match=text):
        concatenate([numbered(), replace(numbered(), **fields)])
