"""CIFAR-10, CIFAR-100 and STL-10 from official files, written here in the official formats with few images."""

import hashlib
import io
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rush.data import sources
from rush.data.readers import stl10
from rush.data.readers.cifar import CifarVersion, cifar10_versions, cifar100_versions
from rush.data.readers.pickles import read_plain_pickle
from rush.data.readers.resizing import resize_images
from rush.errors import DataError

ROWS = 4
PIXELS = np.random.default_rng(0).integers(0, 256, (8 * ROWS, 3, 32, 32), np.uint8)


def pickled(content: Any) -> bytes:
    """As the official files: protocol 2 with byte strings for keys and names."""
    return pickle.dumps(content, protocol=2)


def as_bytes(names: list[str]) -> list[bytes]:
    return [name.encode() for name in names]


def labels_of(version: CifarVersion, rows: range) -> list[int]:
    return [row * 7 % version.num_classes for row in rows]


def member_bytes(version: CifarVersion, rows: range) -> bytes:
    labels = labels_of(version, rows)
    flat = PIXELS[rows.start : rows.stop].reshape(len(rows), -1)
    if version.labels_key:
        return pickled(
            {
                b"batch_label": b"some batch",
                version.labels_key.encode(): labels,
                b"data": flat,
                b"filenames": [b"x.png"],
            }
        )
    coarse = np.full((len(rows), version.label_bytes - 1), 19, np.uint8)
    return np.hstack([coarse, np.array(labels, np.uint8)[:, None], flat]).tobytes()


def names_bytes(version: CifarVersion) -> bytes:
    names = [f"class{number}" for number in range(version.num_classes)]
    if version.names_key:
        return pickled({version.names_key.encode(): as_bytes(names), b"num_vis": 3072})
    return ("\n".join(names) + "\n\n").encode()


def write_folder(version: CifarVersion, root: Path) -> Path:
    """All members of the small data set; file k holds the images 4 k to 4 k + 3."""
    folder = root / version.archive.folder
    folder.mkdir(parents=True)
    for number, file in enumerate([*version.files["train"], *version.files["test"]]):
        (folder / file).write_bytes(member_bytes(version, range(ROWS * number, ROWS * (number + 1))))
    (folder / version.names_file).write_bytes(names_bytes(version))
    return folder


def pack(folder: Path, path: Path) -> str:
    """``folder`` as ``path`` (.tar.gz); its MD5."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, arcname=folder.name)
    return hashlib.md5(path.read_bytes()).hexdigest()


def small(version: CifarVersion) -> CifarVersion:
    return replace(version, rows={"train": ROWS, "test": ROWS})


def use(monkeypatch: pytest.MonkeyPatch, name: str, version: CifarVersion) -> None:
    monkeypatch.setattr(sources, f"{name}_versions", lambda: (version,))


CIFAR10 = tuple(map(small, cifar10_versions()))
"""The Python and the binary version with few images."""
EVERY = [
    pytest.param(name, small(version), id=version.archive.file)
    for name, versions in (("cifar10", cifar10_versions()), ("cifar100", cifar100_versions()))
    for version in versions
]


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize(("name", "version"), EVERY)
def test_all_versions_give_the_same_images_in_official_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: CifarVersion, packed: bool
) -> None:
    folder = write_folder(version, tmp_path)
    if packed:
        md5 = pack(folder, tmp_path / version.archive.file)
        shutil.rmtree(folder)
        version = replace(version, archive=replace(version.archive, md5=md5))
    use(monkeypatch, name, version)
    start = 0
    for split in ("train", "test"):
        rows = range(start, start + ROWS * len(version.files[split]))
        images = sources.load_images(name, split, root=tmp_path, download=False)
        assert images.images.numpy().tolist() == PIXELS[rows.start : rows.stop].tolist()
        assert images.labels.tolist() == labels_of(version, rows)
        assert images.ids.tolist() == [f"{split}-{row:05d}" for row in range(len(rows))]
        assert images.classes == tuple(f"class{number}" for number in range(version.num_classes))
        start = rows.stop


def test_of_several_folders_the_first_that_holds_an_archive_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Official archives are the same everywhere, so that a second one does no harm; shards beside it are not mixed."""
    version = CIFAR10[1]
    use(monkeypatch, "cifar10", version)
    roots = [tmp_path / name for name in ("shards", "one", "two")]
    roots[0].mkdir()
    write_folder(version, roots[1])
    write_folder(version, roots[2])
    (roots[2] / version.archive.folder / version.files["test"][0]).write_bytes(b"never read")
    alone = sources.load_images("cifar10", root=roots[1], download=False)
    assert sources.load_images("cifar10", root=roots, download=False).fingerprint == alone.fingerprint
    (roots[0] / "test-00000-of-00001.parquet").write_bytes(b"never read")
    assert sources.load_images("cifar10", root=roots, download=False).fingerprint == alone.fingerprint
    assert sources.decoded_bytes("cifar10", "test", roots) == 10_000 * 3072
    assert sources.open_encoded("cifar10", "test", roots) is None


def test_a_download_goes_to_the_first_of_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = CIFAR10[0]
    use(monkeypatch, "cifar10", version)
    roots = [tmp_path / name for name in "ab"]
    for root in roots:
        root.mkdir()

    def fetched(url: str, known_hash: str, target: Path) -> Path:
        assert (url, known_hash) == (version.archive.url, f"md5:{version.archive.md5}")
        assert target.name == version.archive.file
        return write_folder(version, target.parent)

    monkeypatch.setattr(sources, "fetch", fetched)
    assert len(sources.load_images("cifar10", root=roots)) == ROWS
    assert [len(list(root.iterdir())) for root in roots] == [1, 0]


def test_the_official_sizes_are_expected(tmp_path: Path) -> None:
    """Unpatched, the real table (10,000 images per file) is used: one full-size binary test file is read."""
    version = cifar100_versions()[1]
    folder = tmp_path / version.archive.folder
    folder.mkdir()
    records = np.zeros((10_000, 2 + 3072), np.uint8)
    records[:, 0], records[:, 1], records[-1, -1] = 19, np.arange(10_000) % 100, 77
    records.tofile(folder / "test.bin")
    (folder / version.names_file).write_bytes(names_bytes(version))
    images = sources.load_images("cifar100", root=folder, download=False)
    assert images.labels.tolist() == [row % 100 for row in range(10_000)]
    assert images.images.flatten().nonzero().flatten().tolist() == [10_000 * 3072 - 1]
    assert images.ids[-1] == "test-09999"


def test_a_wrong_hash_names_the_file_both_hashes_and_the_remedy(tmp_path: Path) -> None:
    """Whatever is wrong with an archive, truncated or altered, its bytes are not the official ones."""
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"truncated")
    md5 = hashlib.md5(b"truncated").hexdigest()
    expected = (
        f"cifar-10-python.tar.gz has MD5 {md5}, the official file has c58f30108f718f92721af3b95e74349a.*delete it"
    )
    with pytest.raises(DataError, match=expected):
        sources.load_images("cifar10", root=tmp_path)


def test_a_truncated_archive_is_named_even_if_its_hash_were_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = CIFAR10[0]
    path = tmp_path / version.archive.file
    pack(write_folder(version, tmp_path), path)
    path.write_bytes(path.read_bytes()[:-5000])
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    use(monkeypatch, "cifar10", replace(version, archive=replace(version.archive, md5=md5)))
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is damaged or truncated"):
        sources.load_images("cifar10", "test", root=tmp_path)


def assert_named(name: str, split: str, root: Path, file: str, damage: Any, text: str) -> None:
    """A known data set in whose ``file`` the bytes are changed by ``damage`` is refused with ``text`` and the path."""
    path = root / file
    content = damage(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=text) as caught:
        sources.load_images(name, split, root=root)
    assert str(root) in str(caught.value)
    assert "get it again" in str(caught.value) or "label" in str(caught.value)


def batch(rows: int = ROWS, **changes: Any) -> Any:
    """The damage of a pickled batch of ``rows`` images with other labels or pixels."""
    content = {"data": PIXELS[:rows].reshape(rows, -1), "labels": [1] * rows, **changes}
    return lambda _: pickled({key.encode(): value for key, value in content.items()})


NINE = [f"class{number}" for number in range(9)]


@pytest.mark.parametrize(
    ("file", "damage", "text"),
    [
        ("test_batch", lambda _: None, "lacks test_batch"),
        ("test_batch", lambda content: content[: len(content) // 2], "test_batch is damaged or truncated"),
        ("test_batch", lambda _: b"", "test_batch is damaged or truncated"),
        ("test_batch", lambda _: pickled([1, 2]), "test_batch holds a list, expected a dictionary"),
        ("test_batch", lambda _: pickled({b"data": PIXELS[:4]}), r"test_batch has the keys \['data'\], needs"),
        ("test_batch", batch(3), r"shape \(3, 3072\), expected \(4, 3072\)"),
        ("test_batch", batch(labels=[1] * 3), "test_batch: 3 labels for 4 images"),
        ("test_batch", batch(labels=[1, 2, 10, 0]), "test_batch: row 2 has label 10"),
        ("test_batch", batch(data=np.zeros((4, 3072))), "array of f8, expected uint8"),
        ("batches.meta", lambda _: pickled({b"label_names": as_bytes(NINE)}), r"batches\.meta names .*expected 10"),
        ("test_batch.bin", lambda content: content[:-1], r"test_batch\.bin has 12291 bytes, expected 12292"),
        ("test_batch.bin", lambda content: content + b"x", r"test_batch\.bin has more than 12292 bytes"),
        ("test_batch.bin", lambda _: b"", r"test_batch\.bin has 0 bytes"),
        ("test_batch.bin", lambda content: b"\x0a" + content[1:], r"test_batch\.bin: row 0 has label 10"),
        ("batches.meta.txt", lambda _: "\n".join(NINE).encode(), r"batches\.meta\.txt names .*expected 10"),
    ],
)
def test_each_fault_of_cifar_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: Any, text: str
) -> None:
    version = CIFAR10[file.endswith((".bin", ".txt"))]
    use(monkeypatch, "cifar10", version)
    assert_named("cifar10", "test", write_folder(version, tmp_path), file, damage, text)


class PickledCall:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_the_system_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    path = write_folder(CIFAR10[0], tmp_path) / "test_batch"
    marker = tmp_path / "ran"
    evil = pickle.dumps({b"data": PickledCall(os.system, f"touch {marker}"), b"labels": [0] * 4}, protocol=protocol)
    pickle.loads(evil)
    assert marker.exists(), "the pickle must be able to do harm for this test to mean anything"
    marker.unlink()
    path.write_bytes(evil)
    use(monkeypatch, "cifar10", CIFAR10[0])
    with pytest.raises(DataError, match=r"test_batch asks for (posix|nt)\.system, which may run code"):
        sources.load_images("cifar10", root=tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, np.load, np.frombuffer, pickle.loads, bytearray])
def test_every_other_name_is_refused(function: Any) -> None:
    content = pickle.dumps({b"data": PickledCall(function, "1")}, protocol=2)
    with pytest.raises(DataError, match="which may run code"):
        read_plain_pickle(io.BytesIO(content), "file")


def test_the_names_a_plain_pickle_may_use_make_nothing_but_bytes() -> None:
    """numpy.ndarray called directly would allocate what the file asks for, _codecs.encode would load any codec."""
    for call in (PickledCall(np.ndarray, (1 << 40,)), PickledCall(__import__("_codecs").encode, "x", "rot13")):
        with pytest.raises(DataError, match="damaged"):
            read_plain_pickle(io.BytesIO(pickle.dumps({b"data": call}, protocol=2)), "file")


def test_a_python_2_pickle_is_read() -> None:
    """The official files: text of Python 2 (opcode U) for keys and pixels, numpy.core for the module."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x01K\x02t"
        + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"I00\nU\x02\xc8\x07tb"
    )
    content = read_plain_pickle(io.BytesIO(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x03eu."), "file")
    assert content["data"].tolist() == [[200, 7]]
    assert content["labels"] == [3]


def write_stl10(monkeypatch: pytest.MonkeyPatch, root: Path) -> np.ndarray:
    """Six images per split in STL-10's layout: channel, then column, then row."""
    monkeypatch.setattr(stl10, "ROWS", dict.fromkeys(stl10.ROWS, 6))
    monkeypatch.setattr(stl10, "_CHUNK", 4)
    pixels = np.random.default_rng(1).integers(0, 256, (6, 3, 96, 96), np.uint8)
    folder = root / "stl10_binary"
    folder.mkdir()
    for split in ("train", "test", "unlabeled"):
        (folder / f"{split}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
    for split in ("train", "test"):
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 3, 4, 5, 6]))
    (folder / "class_names.txt").write_text("\n".join(f"class{number}" for number in range(10)) + "\n")
    return pixels


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_stl10_is_turned_upright_and_its_labels_start_at_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    pixels = write_stl10(monkeypatch, tmp_path)
    if packed:
        md5 = pack(tmp_path / "stl10_binary", tmp_path / "stl10_binary.tar.gz")
        shutil.rmtree(tmp_path / "stl10_binary")
        monkeypatch.setattr(sources, "STL10", replace(stl10.STL10, md5=md5))
    for split in ("train", "test", "unlabeled"):
        images = sources.load_images("stl10", split, root=tmp_path, download=False)
        assert images.images.equal(images.images.new_tensor(pixels))
        assert images.ids[5] == f"{split}-00005"
        assert images.num_classes == 10
        assert (None if images.labels is None else images.labels.tolist()) == (
            None if split == "unlabeled" else [0, 9, 2, 3, 4, 5]
        )


def test_stl10_at_another_size_and_with_its_splits_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(monkeypatch, tmp_path)
    path = tmp_path / "stl10_binary" / "unlabeled_X.bin"
    path.write_bytes(path.read_bytes()[::-1])
    stored, both = (sources.load_images("stl10", "train+unlabeled", root=tmp_path, size=size) for size in (None, 32))
    assert stored.images.shape == (12, 3, 96, 96)
    assert both.images.equal(resize_images(stored.images, 32))
    assert (both.labels, both.num_classes, both.split) == (None, 10, "train+unlabeled")
    assert both.ids[[0, 6]].tolist() == ["train-00000", "unlabeled-00000"]


@pytest.mark.parametrize(
    ("file", "damage", "text"),
    [
        ("train_X.bin", lambda content: content[:-1], r"train_X\.bin has 165887 bytes, expected 165888"),
        ("train_X.bin", lambda content: content + b"x", r"train_X\.bin has more bytes, expected 165888"),
        ("train_y.bin", lambda content: content[:-1], r"train_y\.bin has 5 bytes, expected 6"),
        (
            "train_y.bin",
            lambda content: b"\x00" + content[1:],
            r"train_y\.bin holds labels 0\.\.10, allowed are 1\.\.10",
        ),
        ("train_y.bin", lambda content: b"\x0b" + content[1:], r"train_y\.bin holds labels 3\.\.11"),
        ("class_names.txt", lambda _: b"cat", r"class_names\.txt names 1 classes, expected 10"),
        ("train_X.bin", lambda _: None, r"stl10_binary lacks train_X\.bin"),
    ],
)
def test_each_fault_of_stl10_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: Any, text: str
) -> None:
    write_stl10(monkeypatch, tmp_path)
    assert_named("stl10", "train", tmp_path / "stl10_binary", file, damage, text)


@pytest.mark.parametrize("place", ["a/0.png", "train/a/0.png", "0.png"])
def test_images_where_an_archive_would_be_downloaded_to_were_meant_to_be_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "fetch", lambda *_: pytest.fail("a download began"))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(tmp_path / place)
    with pytest.raises(DataError, match=f"holds images, first .*{place}, but no cifar10; .*--set data.name={tmp_path}"):
        sources.load_images("cifar10", root=tmp_path)
