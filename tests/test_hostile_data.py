"""Hostile and broken data files: each is refused by an error that names it, within bounds of time and memory."""

import io
import os
import pickle
import re
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from bounded import refused
from encoded_images import STRUCT, class_names, image_column, png, write_shard
from rush.commands.verdict import judge_file
from rush.data.readers.archives import read_words
from rush.data.readers.decoding import MAX_PIXELS, decode
from rush.data.readers.pickles import read_plain_pickle
from rush.data.sources import load_images
from rush.data.streaming import open_stream
from rush.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 5), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def header(shape: str, dtype: str = "'|u1'", order: str = "False") -> bytes:
    """The opening of an .npy file with these claims."""
    text = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def raw(content: bytes, name: str = "images", **arrays: np.ndarray) -> Callable[[Path], Path]:
    """The maker of a file with these bytes in the place of an array, beside other arrays."""
    return lambda path: zipped(path, **{key: npy(array) for key, array in arrays.items()}, **{name: content})


def grey(**arrays: np.ndarray) -> Callable[[Path], Path]:
    """The maker of a file with the images ``GREY`` and these arrays."""
    return lambda path: zipped(path, images=npy(GREY), **{key: npy(array) for key, array in arrays.items()})


def bomb(path: Path) -> Path:
    """Two gigabytes of zeros in two megabytes."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("images.npy", "w", force_zip64=True) as member,
    ):
        member.write(header("(2097152, 32, 32)"))
        for _ in range(128):
            member.write(bytes(1 << 24))
    return path


def overstated(path: Path) -> Path:
    """The directory of the archive claims a member of 10^15 bytes, as its header does."""
    zipped(path, images=header(f"({10**15},)") + bytes(100))
    content = path.read_bytes()
    length = struct.pack("<I", len(header(f"({10**15},)")) + 100)
    path.write_bytes(content.replace(length, struct.pack("<I", 0xFFFFFFF0)))
    return path


def encrypted(path: Path) -> Path:
    content = bytearray(zipped(path, images=npy(GREY)).read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    return path


ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "10^15 bytes claimed": (raw(header(f"({10**15},)") + bytes(10)), "claims uint8"),
    "10^15 labels claimed": (
        raw(header(f"({10**15},)", "'<i8'"), "labels", images=GREY),
        "labels cannot be read: it claims int64",
    ),
    "10^15 in the directory too": (overstated, "cannot be read"),
    "negative shape": (raw(header("(-1, -1)") + bytes(1)), "cannot be read"),
    "huge and empty": (raw(header(f"({2**63}, 0)")), "cannot be read|empty"),
    "bool in the shape": (raw(header("(True, 1)") + bytes(1)), "cannot be read|allowed"),
    "deeply nested header": (raw(header("(" * 9000 + ")" * 9000)), "cannot be read"),
    "objects": (raw(npy(np.array([{}], dtype=object))), "plain numbers and text"),
    "fields": (raw(npy(np.zeros(3, [("a", "u1")]))), "plain numbers and text"),
    "dates": (grey(labels=LABELS.astype("M8[s]")), "plain numbers and text"),
    "version 9": (raw(b"\x93NUMPY\x09\x00" + bytes(200)), "version"),
    "no array": (raw(b"plain text"), "cannot be read"),
    "expanding": (bomb, r"would expand from \d+ to 2147483648 bytes"),
    "encrypted": (encrypted, "cannot be read"),
    "label 10^9": (grey(labels=LABELS * 10**9), "at most 100000 are allowed"),
    "label 2^64 - 1": (grey(labels=LABELS.astype(np.uint64) * np.uint64(2**63 - 1)), "at most 100000 are allowed"),
    "labels of text": (grey(labels=np.array(["cat", "dog"] * 3)), "store the class index of each image"),
    "labels of bytes": (grey(labels=np.array([b"cat", b"dog"] * 3)), "store the class index of each image"),
    "labels 1.7": (grey(labels=LABELS + 0.7), r"labels must be integers.*labels\.astype\(int\)"),
    "labels 1.0": (grey(labels=LABELS + 0.0), r"labels\.astype\(int\)"),
    "labels True": (grey(labels=LABELS > 0), r"labels\.astype\(int\)"),
    "one-hot labels": (grey(labels=np.eye(3, dtype=int)[LABELS]), "argmax"),
    "negative labels": (grey(labels=-LABELS), "row 1 has label -1"),
    "a class of one": (grey(labels=LABELS * 0), "at least two"),
    "one label that is not 0": (grey(labels=LABELS * 0 + 3), "at least two"),
    "two classes of one name": (
        grey(labels=LABELS, classes=np.array(["a", "b", "a"])),
        "'a' is empty or a duplicate",
    ),
    "an empty class name": (grey(labels=LABELS, classes=np.array(["a", "b", ""])), "'' is empty or a duplicate"),
    "class names 1.5": (grey(labels=LABELS, classes=np.array([0.5, 1.5, 2.5])), "classes must be text"),
    "a million class names": (grey(classes=np.arange(10**6)), "K <= 100000"),
    "duplicate ids": (grey(ids=np.array([b"x"] * 6)), "duplicate id 'x'"),
    "ids that are not UTF-8": (grey(ids=np.array([b"\xff%d" % k for k in range(6)])), "not UTF-8"),
    "ids of floats": (grey(ids=np.arange(6) / 2), "ids must be text"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_npz_is_refused(name: str, tmp_path: Path, processes: ForkServerContext) -> None:
    make, text = ARCHIVES[name]
    message = refused(processes, load_images, make(tmp_path / "mine.npz"))
    assert str(tmp_path / "mine.npz") in message
    assert re.search(text, message), message


@pytest.mark.parametrize("name", ["10^15 bytes claimed", "objects", "expanding"])
def test_points_from_outside_are_read_within_the_same_bounds(
    name: str, tmp_path: Path, processes: ForkServerContext
) -> None:
    file = ARCHIVES[name][0](tmp_path / "points.npz")
    assert "points.npz" in refused(processes, judge_file, file, None, None, None)


def test_ids_and_names_in_bytes_are_utf_8_without_a_byte_order_mark(tmp_path: Path) -> None:
    ids = np.array([f"é{number}".encode() for number in range(6)])
    classes = np.array(["\ufeffcat", "dog", "cow"])
    np.savez(tmp_path / "mine.npz", images=GREY, labels=LABELS[:, None], ids=ids, classes=classes)
    images = load_images(tmp_path / "mine.npz")
    assert images.ids.tolist() == [f"é{number}" for number in range(6)]
    assert images.classes == ("cat", "dog", "cow")
    assert images.labels.tolist() == LABELS.tolist()


def test_fortran_order_and_other_byte_orders_are_read_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=np.asfortranarray(GREY), labels=LABELS.astype(">i2"))
    images = load_images(tmp_path / "mine.npz")
    assert images.images[:, 0].tolist() == GREY.tolist()
    assert images.labels.tolist() == LABELS.tolist()


IMAGES = image_column([png(image) for image in GREY])
SHARD = "test-00000-of-00001.parquet"


def shard(
    folder: Path,
    labels: Any = (0, 1) * 3,
    images: pa.Array = IMAGES,
    metadata: bytes | None = None,
    names: Any = None,
    file: str = SHARD,
) -> Path:
    metadata = metadata if names is None else class_names(names)
    return write_shard(folder / file, {"image": images, "label": labels}, metadata)


def labelled(labels: Any) -> Callable[[Path], Path]:
    return lambda folder: shard(folder, labels)


def described(**options: Any) -> Callable[[Path], Path]:
    """The maker of a shard with this ``metadata`` or these class ``names``."""
    return lambda folder: shard(folder, **options)


def showing(*images: Any) -> Callable[[Path], Path]:
    """The maker of a shard with these in the place of its images."""
    return lambda folder: shard(folder, images=pa.array(images * 6))


NESTED = b'{"info": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "labels of text": (labelled(["cat", "dog"] * 3), "labels of the type string"),
    "labels of lists": (labelled([[1], [2]] * 3), "labels of the type list"),
    "labels of times": (labelled(pa.array([1] * 6, pa.timestamp("s"))), "labels of the type timestamp"),
    "labels of bytes": (labelled([b"a", b"b"] * 3), "labels of the type binary"),
    "labels of structs": (labelled([{"a": 1}, {"a": 2}] * 3), "labels of the type struct"),
    "labels of truth": (labelled([True, False] * 3), "labels of the type bool"),
    "labels 1.7": (labelled([0.0, 1.7] * 3), "labels of the type double"),
    "labels of decimals": (labelled(pa.array([1, 2] * 3).cast(pa.decimal128(38, 0))), "of the type decimal"),
    "labels of text in a dictionary": (
        labelled(pa.array(["cat", "dog"] * 3).dictionary_encode()),
        "labels of the type dictionary",
    ),
    "labels of nothing": (labelled(pa.nulls(6)), "labels of the type null"),
    "missing labels": (labelled([0, None] * 3), "3 rows without a label"),
    "negative labels": (labelled([0, -1] * 3), "row 1 has label -1"),
    "label 10^9": (labelled([0, 10**9] * 3), "at most 100000 are allowed"),
    "label 2^64 - 1": (labelled(pa.array([0, 2**64 - 1] * 3, pa.uint64())), "at most 100000 are allowed"),
    "one class": (labelled([1] * 6), "at least two"),
    "nested metadata": (described(metadata=NESTED), "'huggingface' has no info.features"),
    "metadata of another kind": (described(metadata=b"[1]"), "'huggingface' has no info.features"),
    "metadata that are empty": (described(metadata=b"{}"), "'huggingface' has no info.features"),
    "metadata that are no text": (described(metadata=b"\xff"), "'huggingface' has no info.features"),
    "class names of numbers": (described(names=[1, 2]), "must be a list of strings"),
    "class names of an object": (described(names={"a": 1}), "must be a list of strings"),
    "class names of a text": (described(names="ab"), "must be a list of strings"),
    "one name twice": (described(names=["a", "a"]), "'a' is empty or a duplicate"),
    "bytes that are integers": (showing({"bytes": 7, "path": None}), "it needs 'img' or 'image'"),
    "bytes that are lists": (showing({"bytes": [7, 8], "path": None}), "it needs 'img' or 'image'"),
    "bytes that are text": (showing({"bytes": "x", "path": "y"}), "it needs 'img' or 'image'"),
    "paths that are numbers": (showing({"bytes": b"x", "path": 1}), "it needs 'img' or 'image'"),
    "an image that is none": (showing(b"x"), "it needs 'img' or 'image'"),
    "no image column": (lambda d: write_shard(d / SHARD, {"label": [0, 1]}), "it needs 'img'"),
    "millions of empty rows": (
        lambda d: shard(d, np.zeros(3_000_000, np.int8), pa.nulls(3_000_000, STRUCT)),
        "claims 3000000 rows",
    ),
    "no rows": (lambda d: shard(d, [], IMAGES[:0]), "is empty"),
    "no image bytes": (described(images=pa.nulls(6, STRUCT)), "row 0 has no image bytes"),
    "a directory": (lambda d: (d / SHARD).mkdir(), "is a directory"),
    "a pipe": (lambda d: os.mkfifo(d / SHARD), "is a pipe"),
    "noise": (lambda d: (d / SHARD).write_bytes(b"PAR1" + RNG.bytes(5000) + b"PAR1"), "cannot be read"),
    "a shard missing": (
        described(file="test-00000-of-00002.parquet"),
        "test-00001-of-00002.parquet is missing",
    ),
    "a series and a single file": (
        lambda d: (shard(d), (d / "test.parquet").write_bytes(b"")),
        "are of several series",
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SHARDS)
def test_a_hostile_shard_is_refused(name: str, tmp_path: Path, processes: ForkServerContext) -> None:
    make, text = SHARDS[name]
    make(tmp_path)
    message = refused(processes, load_images, tmp_path)
    assert str(tmp_path) in message
    assert text in message


def load_damaged(folder: Path, seed: int, attempts: int) -> None:
    """Load a shard with a few bytes of its footer replaced, again and again."""
    chance = np.random.default_rng(seed)
    file = folder / SHARD
    content = file.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for _ in range(attempts):
        damaged = bytearray(content)
        for place in chance.integers(footer, len(content), 3):
            damaged[place] = chance.integers(256)
        file.write_bytes(damaged)
        try:
            load_images(folder)
        except DataError as error:
            if str(folder) not in str(error):
                raise RuntimeError(str(error)) from error
    raise DataError("all were refused or read")


@pytest.mark.timeout(120)
def test_a_damaged_footer_is_refused_and_ends_no_process(tmp_path: Path, processes: ForkServerContext) -> None:
    """pyarrow ended the process for about one such footer in some thousand."""
    shard(tmp_path, images=image_column([png(GREY[0])] * 6, list("012345")))
    assert refused(processes, load_damaged, tmp_path, 0, 600) == "all were refused or read"


def test_integers_in_a_dictionary_are_labels(tmp_path: Path) -> None:
    shard(tmp_path, pa.array([0, 1, 2] * 2).dictionary_encode())
    assert load_images(tmp_path).labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_all_splits_of_shards_name_the_same_classes(tmp_path: Path) -> None:
    shard(tmp_path, names=["a", "b"], file="train-0.parquet")
    shard(tmp_path, names=["b", "a"], file="test-0.parquet")
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"0\.parquet names the classes .*give all splits the same names"):
            load_images(tmp_path, split)
    shard(tmp_path, names=["a", "b"], file="test-0.parquet")
    assert load_images(tmp_path, "test").classes == ("a", "b")


def test_classes_that_are_not_named_are_counted_over_all_splits(tmp_path: Path) -> None:
    shard(tmp_path, [0, 1, 2] * 2, file="train.parquet")
    shard(tmp_path, [1] * 6, file="test.parquet")
    (tmp_path / "val-0.parquet").write_bytes(b"damaged")
    assert load_images(tmp_path, "train").classes == load_images(tmp_path, "test").classes == ("0", "1", "2")
    with pytest.raises(DataError, match=r"val-0\.parquet cannot be read"):
        load_images(tmp_path, "val")


def png_file(width: int, height: int, depth: int, colour: int, content: bytes) -> bytes:
    """A PNG file written by hand. Its type of colour is 2 for RGB, 4 for grey with alpha and 6 for RGB with alpha."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    opening = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return opening + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def huge_png(width: int, height: int) -> bytes:
    return png_file(width, height, 8, 2, bytes(1 << 20))


def deep_png(colour: int) -> bytes:
    """16 bits per channel."""
    samples = {2: 3, 4: 2, 6: 4}[colour]
    return png_file(4, 4, 16, colour, (b"\0" + b"\xff" * (4 * 2 * samples)) * 4)


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    """The maker of a file of these bytes."""
    return at(name, lambda path: path.write_bytes(content))


def saved(name: str, image: Image.Image, **options: Any) -> Callable[[Path], Path]:
    """The maker of a file that Pillow saves."""
    return at(name, lambda path: image.save(path, **options))


def at(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """The maker of something at ``name`` in a folder, whose path is returned."""

    def made(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return made


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWEBPVP8 ")
        file.truncate(3 << 30)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)
        server.bind(path.name)


def truncated(path: Path) -> None:
    COLOUR.resize((99, 99)).save(path)
    path.write_bytes(path.read_bytes()[:-500])


COLOUR = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8))
NEARLY_OPAQUE = COLOUR.convert("RGBA")
NEARLY_OPAQUE.putpixel((2, 3), (0, 0, 0, 254))
FRAMES = [COLOUR.rotate(angle) for angle in (90, 180)]


def deep_tiff() -> bytes:
    """A TIFF of 16 bits per channel in colour."""
    pixels = RNG.bytes(4 * 4 * 6)
    entries = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 300)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    content = (b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)).ljust(200, b"\0") + struct.pack(
        "<HHH", 16, 16, 16
    )
    return content.ljust(300, b"\0") + pixels


PICTURES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a bomb": (written("x.png", huge_png(60_000, 60_000)), f"at most {MAX_PIXELS} pixels"),
    "one pixel too many": (written("x.png", huge_png(8193, 8192)), f"at most {MAX_PIXELS} pixels"),
    "between Pillow's limits": (written("x.png", huge_png(10_000, 10_000)), f"at most {MAX_PIXELS} pixels"),
    "a huge file": (at("x.webp", sparse), "at most 268435456 are read"),
    "a short bomb": (written("x.png", huge_png(8192, 8192)), "cannot be decoded"),
    "an animated GIF": (saved("x.gif", COLOUR, save_all=True, append_images=FRAMES), "several images"),
    "an animated PNG": (saved("x.png", COLOUR, save_all=True, append_images=FRAMES), "several images"),
    "an animated WebP": (saved("x.webp", COLOUR, save_all=True, append_images=FRAMES), "several images"),
    "a TIFF of pages": (saved("x.tif", COLOUR, save_all=True, append_images=FRAMES), "several images"),
    "CMYK in JPEG": (saved("x.jpg", COLOUR.convert("CMYK")), "has mode CMYK"),
    "CMYK in TIFF": (saved("x.tif", COLOUR.convert("CMYK")), "has mode CMYK"),
    "LAB": (saved("x.tif", Image.new("LAB", (4, 4))), "has mode LAB"),
    "16-bit grey": (saved("x.png", Image.new("I;16", (4, 4))), "has mode I;16"),
    "16-bit colour": (written("x.png", deep_png(2)), "more than 8 bits per channel"),
    "16-bit grey with alpha": (written("x.png", deep_png(4)), "more than 8 bits per channel"),
    "16-bit colour with alpha": (written("x.png", deep_png(6)), "more than 8 bits per channel"),
    "16-bit colour in TIFF": (written("x.tif", deep_tiff()), "more than 8 bits per channel"),
    "16-bit colour in PPM": (written("x.ppm", b"P6 4 4 65535\n" + RNG.bytes(96)), "more than 8 bits per channel"),
    "16-bit grey in PGM": (written("x.pgm", b"P5 4 4 65535\n" + RNG.bytes(32)), "has mode I"),
    "floats": (saved("x.tif", Image.new("F", (4, 4))), "has mode F"),
    "a transparent pixel": (saved("x.png", NEARLY_OPAQUE), "transparent pixels"),
    "a transparent grey": (saved("x.png", Image.new("L", (4, 4)), transparency=0), "transparent pixels"),
    "a transparent colour": (saved("x.png", Image.new("RGB", (4, 4)), transparency=(0, 0, 0)), "transparent pixels"),
    "a transparent entry of the palette": (
        saved("x.png", Image.new("P", (4, 4)), transparency=0),
        "transparent pixels",
    ),
    "a transparent bit": (saved("x.png", Image.new("1", (4, 4)), transparency=0), "transparent pixels"),
    "a transparent GIF": (saved("x.gif", Image.new("P", (4, 4)), transparency=0), "transparent pixels"),
    "PostScript": (
        written("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n"),
        "cannot be read as an image",
    ),
    "text": (written("x.png", b"not an image"), "cannot be read as an image"),
    "nothing": (written("x.png", b""), "cannot be read as an image"),
    "a truncated JPEG": (at("x.jpg", truncated), "cannot be decoded"),
    "a truncated PNG": (at("x.png", truncated), "cannot be decoded"),
    "a truncated WebP": (at("x.webp", truncated), "cannot be decoded"),
    "a PNG with a wrong checksum": (
        written("x.png", png(GREY[0]).replace(b"IDAT", b"IDAU")),
        "cannot be decoded",
    ),
    "a pipe": (at("x.png", os.mkfifo), "is a pipe"),
    "a socket": (at("x.png", listening), "is a pipe, socket or device"),
    "a device": (at("x.png", lambda path: path.symlink_to("/dev/zero")), "is a pipe, socket or device"),
    "a directory": (at("x.png", Path.mkdir), "is a directory"),
    "a link to nothing": (at("x.png", lambda path: path.symlink_to("nowhere")), "is a broken link"),
    "a link to itself": (at("x.png", lambda path: path.symlink_to("x.png")), "is a broken link"),
    "no file": (at("x.png", lambda _: None), "is missing"),
}


def decode_file(file: Path) -> np.ndarray:
    return decode((str(file), file))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", PICTURES)
def test_a_hostile_picture_is_refused(name: str, tmp_path: Path, processes: ForkServerContext) -> None:
    make, text = PICTURES[name]
    file = make(tmp_path)
    message = refused(processes, decode_file, file)
    assert str(file) in message
    assert text in message
    assert "\n" not in message


def test_a_picture_in_a_set_meets_the_same_bounds(tmp_path: Path, processes: ForkServerContext) -> None:
    shards, files = tmp_path / "shards", tmp_path / "files"
    shard(shards, images=image_column([huge_png(60_000, 60_000)] * 6))
    files.mkdir()
    written("x.png", huge_png(60_000, 60_000))(files)
    for folder, name in ((shards, "row 0"), (files, f"{files}/x.png")):
        assert f"{name} is 60000x60000, at most {MAX_PIXELS}" in refused(processes, load_images, folder)
        assert f"{name} is 60000x60000, at most {MAX_PIXELS}" in refused(processes, open_stream, folder, "test")


def deep_key(depth: int) -> bytes:
    """A dictionary whose key is a tuple in a tuple in a tuple, ..."""
    return b"\x80\x02}" + b")" + b"\x85" * depth + b"K\x01s."


PICKLES: dict[str, tuple[bytes, str]] = {
    "deep keys": (deep_key(1_000_000), "more than 1000 tuples"),
    "fewer deep keys": (deep_key(900), "a key is a tuple"),
    "deep lists": (b"\x80\x02}U\x01a" + b"]" * 100_000 + b"a" * 99_999 + b"s.", ""),
    "keys of numbers": (pickle.dumps({1: 2}), "a key is a int"),
    "a memo of 34 GB": (b"\x80\x02}r\xff\xff\xff\x7f.", "place 2147483647 of the memo"),
    "a text of 2^62 bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "damaged"),
    "a long of 2^31 bytes": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", "damaged"),
    "a negative length": (b"\x80\x02T" + struct.pack("<i", -1) + b".", "damaged"),
    "sets": (pickle.dumps({b"a": {1}}, 4), "opcode EMPTY_SET"),
    "a class": (b"\x80\x02}(U\x01ac__main__\nX\n)\x81u.", "opcode NEWOBJ|asks for __main__"),
    "a persistent name": (b"\x80\x02}U\x01aPname\ns.", "opcode PERSID"),
    "an array of other bytes": (pickle.dumps({b"data": np.zeros(3)}, 2), "expected uint8"),
    "a list": (b"].", "holds a list"),
    "noise": (bytes(range(256)) * 4, "damaged"),
}


def read_pickle(content: bytes) -> Any:
    return {key: type(value) for key, value in read_plain_pickle(io.BytesIO(content), "batch").items()}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused(name: str, processes: ForkServerContext) -> None:
    content, text = PICKLES[name]
    if not text:
        assert read_pickle(content) == {"a": list}
        return
    message = refused(processes, read_pickle, content)
    assert message.startswith("batch ")
    assert any(part in message for part in text.split("|"))
    assert "get it again" in message


def test_class_names_in_text_have_a_bound_and_no_byte_order_mark() -> None:
    assert read_words(io.BytesIO(b"\xef\xbb\xbfcat dog\n")) == ["cat", "dog"]
    with pytest.raises(ValueError, match="more than 1048576 bytes of class names"):
        read_words(io.BytesIO(b"cat " * (1 << 19)))


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_a_text_that_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"cannot be looked up as a path|does not exist"):
        load_images(path)
