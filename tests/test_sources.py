"""Names, roots and the embedded digits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rush.data.readers.resizing import resize_images
from rush.data.sources import decoded_bytes, load_images
from rush.errors import DataError, InputError


def test_digits_are_scikit_learns_pixels_in_two_disjoint_stratified_splits() -> None:
    from sklearn import datasets

    source = datasets.load_digits()
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert (len(train), len(test)) == (1397, 400)
    assert set(train.ids) | set(test.ids) == {f"digits-{row:04d}" for row in range(1797)}
    for part in (train, test):
        rows = [int(name.removeprefix("digits-")) for name in part.ids]
        assert part.labels.tolist() == source.target[rows].tolist()
        assert np.abs(part.images[:, 0].numpy() - source.images[rows] * 255 / 16).max() <= 0.5
    shares = np.bincount(test.labels.numpy()) / np.bincount(source.target)
    assert np.abs(shares * np.bincount(source.target) - np.bincount(source.target) * 400 / 1797).max() < 1


def test_the_split_of_the_digits_never_changes() -> None:
    """A model trained on one version must not meet its training images in the test split of another."""
    assert (
        load_images("digits", "test").fingerprint == "4a3f11f1285d116304f6856bc095d47c8e5e451ff8e4976db7c0c8e9ff638b21"
    )


def test_an_unknown_name_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"digits, cifar10, cifar100, stl10.*did you mean 'cifar10'"):
        load_images("CIFAR-10")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz does not exist"):
        load_images(tmp_path / "nothing.npz")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"images\.csv is a \.csv file; allowed are digits"):
        load_images(tmp_path / "images.csv")


@pytest.mark.parametrize(("name", "allowed"), [("digits", "train, test"), ("stl10", "train, test, unlabeled")])
def test_an_unknown_split_lists_the_splits(name: str, allowed: str) -> None:
    with pytest.raises(DataError, match=f"no split 'dev'; allowed are {allowed}"):
        load_images(name, "dev")


def test_without_download_an_empty_root_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz, cifar-10-batches-py.*parquet") as caught:
        load_images("cifar10", root=tmp_path, download=False)
    assert str(tmp_path) in str(caught.value)


def test_the_root_comes_from_the_argument_then_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSH_DATA", str(tmp_path / "environment"))
    with pytest.raises(DataError, match="environment holds no cifar10"):
        load_images("cifar10", download=False)
    argument = tmp_path / "argument"
    argument.mkdir()
    with pytest.raises(DataError, match="argument holds no cifar10"):
        load_images("cifar10", root=argument, download=False)


@pytest.mark.parametrize("names", [["mistyped"], ["a", "mistyped"]])
def test_nothing_is_downloaded_where_a_root_is_mistyped(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="mistyped is not a directory; pass one that exists"):
        load_images("cifar10", root=[tmp_path / name for name in names])
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_relative_paths_are_looked_up_in_the_root(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=np.full((2, 4, 4), 7, np.uint8))
    assert load_images("mine.npz", root=tmp_path).images.unique().tolist() == [7]


def test_of_several_folders_one_may_hold_an_npz_file_or_class_folders(tmp_path: Path) -> None:
    """Two of them could not be told apart or joined: ids would repeat, and no name says what comes first."""
    roots = [tmp_path / "a", tmp_path / "b"]
    pixels = np.full((2, 4, 4), 7, np.uint8)
    for root in roots:
        root.mkdir()
    np.savez(roots[1] / "mine.npz", images=pixels)
    assert load_images("mine.npz", root=roots).images.unique().tolist() == [7]
    assert decoded_bytes("mine.npz", "test", roots) == decoded_bytes(roots[1] / "mine.npz", "test")
    np.savez(roots[0] / "mine.npz", images=pixels)
    with pytest.raises(DataError, match=rf"{roots[0]}/mine\.npz and {roots[1]}/mine\.npz exist, but only"):
        load_images("mine.npz", root=roots)
    for label in ("cat", "dog"):
        (roots[1] / "set" / label).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(roots[1] / "set" / label / "0.png")
    assert load_images("set", root=roots).classes == ("cat", "dog")
    (roots[0] / "set").mkdir()
    with pytest.raises(DataError, match=r"only folders of parquet shards are joined; name the one to read"):
        load_images("set", root=roots)
    with pytest.raises(DataError, match=rf"and {roots[0]}/none or {roots[1]}/none does not exist"):
        load_images("none", root=roots)


@pytest.mark.parametrize("root", [[], (), 5, ["a", 5], b"a", {"a"}])
def test_a_root_that_is_no_folder_and_no_list_of_them_is_refused(root: object) -> None:
    with pytest.raises(InputError, match="root must be a folder or a list of at least one folder, got "):
        load_images("cifar10", root=root)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="root must be a folder or a list of at least one folder, got "):
        decoded_bytes("some.npz", "test", root)  # type: ignore[arg-type]


def test_all_of_several_roots_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{tmp_path}/a and {tmp_path}/b hold no cifar10.* {tmp_path}/b/cifar10 for"):
        load_images("cifar10", root=[tmp_path / "a", tmp_path / "b"], download=False)


def test_importing_the_loaders_imports_no_decoder() -> None:
    """The readers' libraries are loaded when a file needs them, so that digits never wait for parquet."""
    code = (
        "import sys, rush.data.sources; "
        "print([name for name in ('pyarrow', 'sklearn', 'PIL', 'pooch', 'rich') if name in sys.modules])"
    )
    path = str(Path(__file__).parents[1] / "src")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert result.stdout.strip() == "[]"


def test_joined_splits_and_one_size_for_sets_that_are_loaded_whole(tmp_path: Path) -> None:
    train, test = load_images("digits", "train"), load_images("digits", "test")
    both = load_images("digits", "test+train", size=5)
    assert both.images.shape == (1797, 1, 5, 5)
    assert both.ids.tolist() == [*test.ids, *train.ids]
    assert both.labels.tolist() == [*test.labels.tolist(), *train.labels.tolist()]
    with pytest.raises(DataError, match=r"no split 'dev'; allowed are train, test"):
        load_images("digits", "train+dev")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 9, 3), np.uint8)
    np.savez(tmp_path / "mine.npz", x_train=pixels, x_test=pixels[:1] // 2)
    assert load_images(tmp_path / "mine.npz", "train+test", size=4).images.shape == (4, 3, 4, 4)
    np.savez(tmp_path / "any.npz", images=pixels)
    with pytest.raises(DataError, match="split 'test' holds the images of another part"):
        load_images(tmp_path / "any.npz", "train+test")


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "8"])
def test_a_wrong_size_is_refused(size: object) -> None:
    with pytest.raises(InputError, match="size must be a number of pixels >= 1"):
        load_images("digits", size=size)


@pytest.mark.parametrize(("height", "width", "size"), [(96, 96, 32), (96, 96, 48), (40, 64, 16), (66, 42, 24)])
def test_resizing_is_the_antialiased_bilinear_one_of_the_central_square(height: int, width: int, size: int) -> None:
    """Against torch's own: both round to 8 bits, Pillow after each axis, so that they may differ by one level."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, height, width), generator=generator, dtype=torch.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[:, :, top : top + side, left : left + side]
    expected = torch.nn.functional.interpolate(
        square.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    resized = resize_images(images, size).float()
    inner = slice(1, -1)  # beside a cut the one sees the pixels behind it, the other does not
    assert (resized - expected)[:, :, inner, inner].abs().max() <= 1
    assert resize_images(square, side) is square
    grey = resize_images(images[:, :1], size)
    assert grey[:, 0].equal(resize_images(images[:, :1].repeat(1, 3, 1, 1), size)[:, 2])


SHARED = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs CIFAR-10 in parquet beside the project")
def test_real_cifar10_from_parquet_by_name_and_by_path() -> None:
    images = load_images("cifar10", "test", root=SHARED)
    assert images.images.shape == (10000, 3, 32, 32)
    assert images.labels.bincount().tolist() == [1000] * 10
    assert images.classes[0] == "airplane"
    mean = images.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4942, 0.4851, 0.4504], dtype=torch.float64), atol=5e-4)
    assert load_images("cifar10", "test", root=SHARED.parent)[:50].fingerprint == images[:50].fingerprint
