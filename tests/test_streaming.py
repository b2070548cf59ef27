"""Streams yield every image of the files once per epoch, in a random order, within the given memory."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from encoded_images import image_column, png, write_shard
from rush.data import streaming
from rush.data.batches import Batch, Resident
from rush.data.images import hold_out
from rush.data.readers.decoding import Encoded
from rush.data.readers.parquet import ParquetImages
from rush.data.sources import decoded_bytes, load_images
from rush.data.streaming import Stream, open_stream
from rush.errors import ConfigError, DataError, InputError
from rush.runtime.randomness import stream

SIDE = 6
_ROW_BYTES = 256  # counted for each image that is held, beside its encoded bytes


def numbered(row: int, side: int = SIDE) -> np.ndarray:
    """An RGB image identified by its first pixel: (row // 256, row % 256, 0), and noise elsewhere."""
    pixels = np.random.default_rng(row).integers(0, 256, (side, side, 3), np.uint8)
    pixels[0, 0] = row // 256, row % 256, 0
    return pixels


def numbers(batch: Batch) -> list[int]:
    return [int(image[0, 0, 0]) * 256 + int(image[1, 0, 0]) for image in batch.images]


def write_shards(
    folder: Path, contents: list[bytes], shards: int = 2, group: int = 10, labelled: bool = True, split: str = "train"
) -> Path:
    """The images in order over ``shards`` files with row groups of ``group``; the label of row i is i % 3."""
    bounds = np.linspace(0, len(contents), shards + 1).astype(int)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        columns: dict[str, Any] = {"image": image_column(contents[start:stop])}
        if labelled:
            columns["label"] = [row % 3 for row in range(start, stop)]
        path = folder / f"{split}-{number:05d}-of-{shards:05d}.parquet"
        write_shard(path, columns, row_group_size=group, use_dictionary=False, compression="none")
    return folder


def write_files(folder: Path, rows: range) -> Path:
    for row in rows:
        path = folder / "train" / "abc"[row % 3] / f"{row:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(numbered(row)))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """95 images in two shards of row groups of 10 (and one of 7 and 8)."""
    return write_shards(tmp_path_factory.mktemp("stream") / "shards", [png(numbered(row)) for row in range(95)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("stream") / "files", range(50))


def small(folder: Path, **options: Any) -> Stream:
    """A stream whose pools hold about three row groups of ten images."""
    return replace(open_stream(folder, "train", memory=2 * 3 * 10 * (150 + _ROW_BYTES)), **options)


def same(batches: Iterator[Batch], other: Iterator[Batch]) -> bool:
    def labels(batch: Batch) -> list[int] | None:
        return None if batch.labels is None else batch.labels.tolist()

    return all(a.images.equal(b.images) and labels(a) == labels(b) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize("source", ["files", "shards"])
def test_what_fits_in_memory_or_is_files_comes_exactly_as_from_memory(
    source: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(source)
    images, streamed = load_images(folder, "train"), open_stream(folder, "train")
    assert (len(streamed), streamed.classes, streamed.name) == (len(images), images.classes, images.name)
    assert streamed.shape == images.images.shape[1:]
    for first in (0, 2):
        assert same(streamed.batches(stream(1, "o"), 12, first), Resident(images).batches(stream(1, "o"), 12, first))
    bare = streamed.without_labels()
    assert same(bare.batches(stream(1, "o"), 12), Resident(images.without_labels()).batches(stream(1, "o"), 12))


def slow_order(folder: Path, memory: int, generator: torch.Generator) -> list[int]:
    """The order in the words of the documentation: row groups at random, pooled up to half the memory, shuffled."""
    groups, start = [], 0
    for path in sorted(folder.glob("*.parquet")):
        metadata = pq.ParquetFile(path).metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            held = group.column(0).total_uncompressed_size + _ROW_BYTES * group.num_rows
            groups.append((list(range(start, start + group.num_rows)), held))
            start += group.num_rows
    pools: list[list[int]] = [[]]
    room = memory // 2
    for number in torch.randperm(len(groups), generator=generator).tolist():
        rows, held = groups[number]
        if held > room:
            order = torch.randperm(len(pools[-1]), generator=generator).tolist()
            pools[-1] = [pools[-1][place] for place in order]
            pools.append([])
            room = memory // 2
        pools[-1] += rows
        room -= held
    order = torch.randperm(len(pools[-1]), generator=generator).tolist()
    pools[-1] = [pools[-1][place] for place in order]
    assert len(pools) >= 3
    return [row for pool in pools for row in pool]


def test_larger_sets_come_pool_by_pool_each_image_once_with_its_label(shards: Path) -> None:
    streamed = small(shards)
    batches = list(streamed.batches(stream(3, "order"), 9))
    rows = [row for batch in batches for row in numbers(batch)]
    assert rows == slow_order(shards, streamed.memory, stream(3, "order"))[: 9 * (95 // 9)]
    assert len(set(rows)) == len(rows) == 90
    images = load_images(shards, "train")
    assert torch.cat([batch.images for batch in batches]).equal(images.images[rows])
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    assert labels.tolist() == [row % 3 for row in rows]
    # The same order by chance: below 1 / 90!.
    assert rows != [row for batch in streamed.batches(stream(4, "order"), 9) for row in numbers(batch)]


def test_threads_and_timing_change_nothing(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, decode = list(small(shards, threads=1).batches(stream(0, "o"), 8)), streaming.decode

    def late(encoded: Encoded, size: int | None) -> np.ndarray:
        time.sleep(len(encoded[0]) * len(bytes(encoded[1])) % 7 / 5000)
        return decode(encoded, size)

    monkeypatch.setattr(streaming, "decode", late)
    monkeypatch.setattr(streaming, "_TASK", 3)
    assert same(iter(plain), small(shards, threads=5).batches(stream(0, "o"), 8))


def test_each_process_decodes_its_rows_of_each_batch_and_nothing_else(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [numbers(batch) for batch in small(shards).batches(stream(0, "o"), 12)]
    looked_at: list[str] = []
    decode = streaming.decode
    parts = [small(shards, rank=rank, processes=3) for rank in range(3)]

    def watched(encoded: Encoded, size: int | None) -> np.ndarray:
        looked_at.append(encoded[0])
        return decode(encoded, size)

    monkeypatch.setattr(streaming, "decode", watched)
    for rank, part in enumerate(parts):
        looked_at.clear()
        rows = [numbers(batch) for batch in part.batches(stream(0, "o"), 12, first=2)]
        assert rows == [batch[4 * rank : 4 * rank + 4] for batch in whole[2:]]
        assert len(looked_at) == len(set(looked_at)) == 4 * len(rows)
    with pytest.raises(ConfigError, match=r"12 cannot be shared equally by 5"):
        next(small(shards, processes=5).batches(stream(0, "o"), 12))


def test_a_resumed_epoch_reads_no_pool_that_is_over(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = small(shards)
    later = [numbers(batch) for batch in streamed.batches(stream(0, "o"), 9)][8:]
    read: list[int] = []
    plain = ParquetImages.read

    def watched(self: ParquetImages, rows: np.ndarray) -> Iterator[Encoded]:
        read.extend(rows.tolist())
        return plain(self, rows)

    monkeypatch.setattr(ParquetImages, "read", watched)
    assert [numbers(batch) for batch in streamed.batches(stream(0, "o"), 9, first=8)] == later
    assert sorted(read) == sorted(row for batch in later for row in batch)


def test_a_large_row_group_is_read_in_parts(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "one", [png(numbered(row)) for row in range(60)], shards=1, group=60)
    streamed = small(folder)
    assert [(block.start, block.stop) for block in streamed.blocks] == [(0, 20), (20, 40), (40, 60)]
    rows = [numbers(batch) for batch in streamed.batches(stream(0, "o"), 10)]
    assert sorted(rows[0] + rows[1]) in (list(range(20)), list(range(20, 40)), list(range(40, 60)))
    assert sorted(row for batch in rows for row in batch) == list(range(60))
    with pytest.raises(DataError, match=r"00000-of-00001\.parquet has images of about \d{3} bytes.*give at least \d+"):
        open_stream(folder, "train", memory=500)
    with pytest.raises(DataError, match="more than the 1 bytes held at a time; give at least"):
        open_stream(folder, "train", memory=1)


def test_a_damaged_image_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    contents = [png(numbered(row)) for row in range(40)]
    contents[33] = contents[33][:-60]
    folder = write_shards(tmp_path / "bad", contents, shards=2, group=5)
    streamed = small(folder)
    order = [int(row) for pool in streamed._pools(stream(0, "o")) for row in pool]
    batches = streamed.batches(stream(0, "o"), 4)
    for number in range(order.index(33) // 4):
        assert numbers(next(batches)) == order[4 * number : 4 * number + 4]
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet row 13 cannot be decoded"):
        next(batches)
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="is missing"):
        open_stream(folder, "train")


def test_another_size_is_refused_with_the_remedy_and_the_remedy_works(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (SIDE, 2 * SIDE, 3), np.uint8)
    tall = np.random.default_rng(1).integers(0, 256, (3 * SIDE, 2 * SIDE), np.uint8)
    contents = [png(numbered(row)) for row in range(18)] + [png(wide), png(tall)]
    folder = write_shards(tmp_path / "sizes", contents)
    with pytest.raises(DataError, match=r"row \d is 12x\d+, but .*row 0 is 6x6.*data\.size"):
        list(open_stream(folder, "train").batches(stream(0, "o"), 4))
    for size in (4, SIDE, 9):
        streamed = open_stream(folder, "train", size=size)
        images = load_images(folder, "train", size=size)
        assert images.images.shape == (20, 3, size, size)
        assert same(streamed.batches(stream(0, "o"), 5), Resident(images).batches(stream(0, "o"), 5))
    stored = load_images(folder, "train", size=SIDE).images
    assert stored[:18].equal(torch.stack([torch.from_numpy(numbered(row)).permute(2, 0, 1) for row in range(18)]))


def test_greyscale_and_opaque_images_are_taken_as_when_loaded(tmp_path: Path) -> None:
    mixed = [png(numbered(row), mode) for row, mode in enumerate(["L", "RGB", "RGBA", "P", "1", "RGB"])]
    folder = write_shards(tmp_path / "mixed", mixed, shards=1)
    assert same(
        open_stream(folder, "train").batches(stream(0, "o"), 6),
        Resident(load_images(folder, "train")).batches(stream(0, "o"), 6),
    )
    grey = [png(numbered(row), "L") for row in range(40)]
    assert open_stream(write_shards(tmp_path / "grey", grey), "train").shape == (1, SIDE, SIDE)
    coloured = open_stream(write_shards(tmp_path / "late", [*grey, png(numbered(40))], shards=1, group=50), "train")
    with pytest.raises(DataError, match=r"row 40 is in colour, but .*row 0"):
        list(coloured.batches(stream(0, "o"), 41))


@pytest.mark.parametrize("source", ["files", "shards"])
def test_held_out_images_are_those_of_the_loaded_set_and_never_streamed(
    source: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(source)
    rest, held = hold_out(load_images(folder, "train"), 17, stream(0, "held"))
    streamed, kept = open_stream(folder, "train").holding_out(17, stream(0, "held"))
    assert kept.fingerprint == held.fingerprint
    assert len(streamed) == len(rest)
    assert same(streamed.batches(stream(0, "o"), 3), Resident(rest).batches(stream(0, "o"), 3))
    pooled, again = small(folder).without_labels().holding_out(17, stream(0, "held"))
    assert again.labels is None
    rows = [row for batch in pooled.batches(stream(0, "o"), 1) for row in numbers(batch)]
    assert len(set(rows)) == len(rows) == len(rest)
    assert not set(rows) & set(numbers(Batch(again.images, None)))
    further, more = streamed.holding_out(5, stream(0, "more"))
    assert len(further) == len(rest) - 5
    assert not set(more.ids) & set(held.ids)
    with pytest.raises(InputError, match=r"hold out must be in 1\.\.\d+ of \d+, got 0"):
        streamed.holding_out(0, stream(0, "held"))


def test_joined_splits_are_streamed_as_they_are_loaded(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "two", [png(numbered(row)) for row in range(20)])
    write_shards(folder, [png(numbered(row)) for row in range(20, 33)], labelled=False, split="unlabeled")
    images, streamed = load_images(folder, "unlabeled+train"), open_stream(folder, "unlabeled+train")
    assert numbers(Batch(images.images, None)) == [*range(20, 33), *range(20)]
    assert (images.split, images.labels, images.classes) == ("unlabeled+train", None, ("0", "1", "2"))
    assert images.ids[[0, -1]].tolist() == ["unlabeled-00000", "train-00019"]
    assert same(streamed.batches(stream(0, "o"), 4), Resident(images).batches(stream(0, "o"), 4))
    rows = [row for batch in small(folder).batches(stream(0, "o"), 4) for row in numbers(batch)]
    assert len(set(rows)) == 20
    with pytest.raises(DataError, match=r"train-00000-of-00002\.parquet belongs to more than one part"):
        open_stream(folder, "train+train")


def test_the_fingerprint_tells_files_rows_and_labels_apart_and_needs_no_pixels(shards: Path, files: Path) -> None:
    streams = [
        open_stream(shards, "train"),
        open_stream(shards, "train").without_labels(),
        open_stream(shards, "train", size=5),
        open_stream(files, "train"),
        open_stream(shards, "train").holding_out(5, stream(0, "held"))[0],
    ]
    assert len({streamed.fingerprint for streamed in streams}) == 5
    assert streams[0].fingerprint == small(shards, processes=2, rank=1).fingerprint


def test_what_cannot_be_streamed_says_what_to_do(tmp_path: Path, shards: Path) -> None:
    np.savez(tmp_path / "some.npz", images=np.zeros((4, 3, 3), np.uint8))
    for name in ("digits", tmp_path / "some.npz"):
        with pytest.raises(DataError, match=r"only be loaded as a whole.*data\.memory_gb"):
            open_stream(name, "train")
    with pytest.raises(DataError, match="not a known data set"):
        open_stream(tmp_path / "nothing", "train")
    with pytest.raises(ConfigError, match="memory must be an integer >= 1"):
        open_stream(shards, "train", memory=0)
    with pytest.raises(InputError, match="size must be"):
        open_stream(shards, "train", size=0)
    with pytest.raises(ConfigError, match="exceeds the 95"):
        next(open_stream(shards, "train").batches(stream(0, "o"), 96))


def test_decoded_bytes_are_those_of_the_loaded_images(tmp_path: Path, shards: Path, files: Path) -> None:
    np.savez_compressed(tmp_path / "some.npz", images=np.zeros((400, 30, 30), np.uint8))
    for name in (shards, files, "digits"):
        assert decoded_bytes(name, "train") == load_images(name, "train").images.numel()
        assert decoded_bytes(name, "train", size=4) == load_images(name, "train", size=4).images.numel()
    assert decoded_bytes("digits", "train+test") == 1797 * 64
    assert decoded_bytes(tmp_path / "some.npz", "test") == pytest.approx(400 * 900, abs=200)
    assert decoded_bytes("stl10", "train+unlabeled", tmp_path, size=32) == 105_000 * 3 * 32 * 32
    write_shards(tmp_path / "cifar10", [png(numbered(row, 32)) for row in range(5)], labelled=False)
    assert decoded_bytes("cifar10", "train", tmp_path) == 5 * 3072
    assert len(open_stream("cifar10", "train", root=tmp_path)) == 5


def test_shards_of_two_folders_are_streamed_as_those_of_one(tmp_path: Path, shards: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for root, file in zip(roots, sorted(shards.iterdir(), reverse=True), strict=True):
        root.mkdir()
        (root / file.name).symlink_to(file)
    single, joined = (open_stream(".", "train", root=root, memory=20_000) for root in (shards, roots))
    assert joined.fingerprint == single.fingerprint
    assert same(joined.batches(stream(0, "order"), 19), single.batches(stream(0, "order"), 19))


MIB = 1 << 20
MEASURE = """
import json, sys
import torch
from rush.data.streaming import open_stream
from rush.runtime.randomness import stream

def resident():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024

torch.set_num_threads(1)
streamed = open_stream(sys.argv[1], "train", memory=int(sys.argv[2]), threads=2)
next(streamed.batches(stream(0, "first"), 32))
sizes = [resident()]
for batch in streamed.batches(stream(0, "order"), 32):
    sizes.append(resident())
print(json.dumps([len(streamed), sizes]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_memory_stays_within_what_was_given_however_large_the_set(tmp_path: Path) -> None:
    """84 MiB of encoded noise (12 KiB per image), in row groups of 0.8 MiB, through 8 MiB.

    The slack of 24 MiB: four batches of 0.4 MiB at once, what two threads decode and what the reader of the files
    buffers, each with the allocator's own share, which is larger on a busy machine. Holding the set would take 84 MiB.
    """
    noise = np.random.default_rng(0)
    some = [png(noise.integers(0, 256, (64, 64, 3), np.uint8), compress_level=0) for _ in range(64)]
    folder = write_shards(tmp_path / "noise", some * 112, shards=3, group=64)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 80 * MIB
    command = [sys.executable, "-c", MEASURE, str(folder), str(8 * MIB)]
    count, sizes = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert count == 112 * 64
    start, during = sizes[0], sizes[1:]
    assert len(during) == count // 32
    half = len(during) // 2
    assert max(during) - start < (8 + 24) * MIB
    assert max(during[half:]) - max(during[:half]) < 8 * MIB
