"""Decoded images are kept: same bits, decoded once, refused when stale, damaged or from another decoder."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rush.data.readers import cache
from rush.data.sources import load_images
from rush.runtime.user_cache import VARIABLE, user_cache

RNG = np.random.default_rng(0)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images of two classes, which are enough to be kept."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_WORTHWHILE", 6)
    for name in "ab":
        for number in range(3):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(RNG.integers(0, 256, (5, 5, 3), np.uint8)).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images of each later decoding."""
    sizes = list[int]()
    plain = cache.decode_images

    def counted(encoded, total, size=None):  # type: ignore[no-untyped-def]
        sizes.append(total)
        return plain(encoded, total, size)

    monkeypatch.setattr(cache, "decode_images", counted)
    return sizes


def test_images_are_decoded_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = decoded(monkeypatch)
    first, second = (load_images(data, "train") for _ in range(2))
    assert sizes == [6]
    assert second.fingerprint == first.fingerprint
    assert second.images.equal(first.images)
    resized = [load_images(data, "train", size=4) for _ in range(2)]
    assert sizes == [6, 6]
    assert resized[0].images.equal(resized[1].images)
    assert len(list((data.parent / "cache/decoded").iterdir())) == 2


@pytest.mark.parametrize("change", ["pixels", "time", "another", "damaged", "shape", "decoder", "pillow", "emptied"])
def test_what_is_stale_or_damaged_is_decoded_again(change: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_images(data, "train")
    sizes = decoded(monkeypatch)
    (kept,) = (data.parent / "cache/decoded").iterdir()
    image = data / "a/0.png"
    if change == "pixels":
        Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(image)
    elif change == "time":
        os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    elif change == "another":
        image.rename(data / "a/7.png")
    elif change == "damaged":
        kept.write_bytes(kept.read_bytes()[:-1])
    elif change == "shape":
        np.save(kept, np.zeros((5, 3, 5, 5), np.uint8))
    elif change == "decoder":
        monkeypatch.setattr(cache, "_FORMAT", 2)
    elif change == "pillow":
        monkeypatch.setattr(cache, "version", lambda _: "0")
    else:
        kept.unlink()
    images = load_images(data, "train")
    assert sizes == [6]
    monkeypatch.setenv(VARIABLE, "off")
    assert load_images(data, "train").fingerprint == images.fingerprint


def test_few_images_and_a_cache_that_cannot_be_written_are_no_obstacle(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_images(data, "train").fingerprint
    for folder in ("/proc/nowhere", str(data / "a/0.png")):
        monkeypatch.setenv(VARIABLE, folder)
        assert load_images(data, "train").fingerprint == expected
    monkeypatch.setenv(VARIABLE, str(data.parent / "other"))
    monkeypatch.setattr(cache, "_WORTHWHILE", 7)
    assert load_images(data, "train").fingerprint == expected
    assert not (data.parent / "other").exists()


def test_the_folder_is_that_of_the_user_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = user_cache("decoded")
    assert folder is not None
    assert folder.parts[-2:] == ("rush", "decoded")
    monkeypatch.setenv(VARIABLE, "off")
    assert user_cache("decoded") is None
