"""Training images that need not fit in memory: decoded by threads from parquet shards or image files, ahead of use."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, repeat
from mmap import mmap
from pathlib import Path

import numpy as np
import torch

from rush.data.batches import Batch, Resident, TrainingImages, batches_per_epoch, share_of
from rush.data.images import ImageSet, held_out_rows
from rush.data.indexing import rows_within
from rush.data.kind import shape_text
from rush.data.labels import check_several_classes, label_bytes
from rush.data.readers.decoding import Encoded, Form, decode
from rush.data.readers.encoded import Block, EncodedImages
from rush.data.readers.resizing import check_size, num_threads
from rush.data.readers.roots import Root
from rush.data.sources import open_encoded
from rush.errors import ConfigError, DataError
from rush.runtime.transfer import sent

_TASK = 16  # most images per task of a thread
_FILES = 4096  # names of image files that are handed to the threads at a time
_PROBED = 32  # images decoded to determine whether the set is greyscale
_HELD_OUT = 256  # held-out images that are decoded at a time
_SLAB = 1 << 20  # least bytes per slab
EncodedRow = tuple[int, Encoded]
"""A row and its encoded image."""
DecodedRows = tuple[torch.Tensor, np.ndarray]
"""Images uint8 (n, C, H, W) and their rows (n,)."""
Pending = tuple[DecodedRows, list[Future[None]]]
"""Images that are complete when the futures are done."""


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    """The images of a split, read and decoded again in every epoch; a ``TrainingImages``.

    **Order.** If the encoded images fit in ``memory``, or are separate files, an epoch is one uniform permutation of
    the images, the same as that of ``Resident``. Otherwise the blocks (row groups of the shards) are put in random
    order, as many as fit in half of ``memory`` are pooled and shuffled, and the next pool is read while one is used up.
    Images far apart in the files then share a batch only if their blocks share a pool. For shards that are sorted by
    class, ``memory`` should hold many blocks.

    **Memory.** At most ``memory`` bytes of encoded images, the batch returned and the one decoded ahead of it, a few
    megabytes of the files' readers, and 8 bytes per row for labels and order. Nothing grows with the number of epochs.

    Args:
        encoded: the images on disk.
        form: the shape they are decoded to.
        labels: int64, of all rows of ``encoded``, or None.
        rows: the rows that belong to the stream, ascending.
        blocks: all rows of ``encoded`` in parts of at most half of ``memory``, as one pool is used and the next read.
        size: as in ``load_images``.
        memory: bytes of encoded images held at once.
        threads: number of decoding threads. No result depends on it.
        device: device of the batches.
        rank: number of this process.
        processes: number of processes.
    """

    encoded: EncodedImages
    form: Form
    labels: torch.Tensor | None
    rows: np.ndarray
    blocks: list[Block]
    size: int | None
    memory: int
    threads: int = 1
    device: torch.device | str = "cpu"
    rank: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        labelled = "no labels" if self.labels is None else f"{self.num_classes} classes"
        return f"Stream({self.name}/{self.split}: {len(self)} images of {shape_text(self.shape)}, {labelled})"

    @property
    def name(self) -> str:
        return self.encoded.name

    @property
    def split(self) -> str:
        return self.encoded.split

    @property
    def classes(self) -> tuple[str, ...]:
        return self.encoded.classes

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.form.shape

    @property
    def ids(self) -> np.ndarray:
        """Text (N,), read from the files."""
        return self.encoded.ids()[self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the names and sizes of the files, the shape, the rows and the labels; not over pixels."""
        files = [[file.name, os.stat(file).st_size] for file in self.encoded.files()]
        digest = hashlib.sha256(json.dumps(["stream", files, self.shape]).encode())
        digest.update(self.rows.astype("<i8").tobytes())
        digest.update(label_bytes(self.labels))
        return digest.hexdigest()

    def without_labels(self) -> "Stream":
        """Return the same images with ``labels`` None, so that pre-training cannot read them."""
        return replace(self, labels=None)

    def holding_out(self, count: int, generator: torch.Generator) -> tuple["Stream", ImageSet]:
        """Return the stream without the images that ``hold_out`` would draw, and these, decoded into memory.

        Raises:
            InputError: ``count`` is not in 1..N-1.
            DataError: an image cannot be decoded. The message names it.
        """
        labels = None if self.labels is None else self.labels[self.rows]
        drawn = held_out_rows(labels, len(self), count, generator)
        rows = self.rows[drawn]
        sizes = [len(part) for part in np.array_split(rows, -(-count // _HELD_OUT))]
        encoded = zip(rows.tolist(), self.encoded.read(rows), strict=True)
        with closing(self._decoded(encoded, sizes)) as decoded:
            pixels = torch.cat([images for images, _ in decoded])
        held_out = None if labels is None else labels[drawn]
        images = ImageSet(pixels, held_out, self.classes, self.ids[drawn], self.name, self.split)
        return replace(self, rows=np.delete(self.rows, drawn)), images

    def batches(self, order: torch.Generator, batch_size: int, first: int = 0) -> Iterator[Batch]:
        """Yield batches as ``TrainingImages.batches``.

        They depend on ``order``, ``batch_size``, ``memory`` and the files alone. Batches before ``first`` are neither
        read nor decoded.

        Raises:
            ConfigError: ``batch_size`` is not possible.
            DataError: an image cannot be decoded or has a different size. The error names the image and is raised at
                its batch.
        """
        per_epoch, share = batches_per_epoch(len(self), batch_size), share_of(batch_size, self.rank, self.processes)
        # Positions in the epoch's order. All pools are drawn at once, so that a resumed epoch draws the same order.
        positions = range(first * batch_size, per_epoch * batch_size)
        pools = _shares(list(self._pools(order)), positions, batch_size, share)
        sizes = repeat(share.stop - share.start, per_epoch - first)
        with closing(self._read_ahead(pools)) as encoded, closing(self._decoded(encoded, sizes)) as decoded:
            for images, rows in decoded:
                labels = None if self.labels is None else sent(self.labels[rows], self.device)
                yield Batch(sent(images, self.device), labels)

    def _pools(self, order: torch.Generator) -> Iterator[np.ndarray]:
        """Yield all rows once, in the order of the epoch, in pools that are read at once."""
        total = sum(block.num_bytes for block in self.blocks)
        if total <= self.memory:
            rows = _shuffled(self.rows, order)
            step = _FILES if total == 0 else len(rows)
            yield from (rows[start : start + step] for start in range(0, len(rows), step))
            return
        pool: list[np.ndarray] = []
        num_bytes = 0
        for number in torch.randperm(len(self.blocks), generator=order).tolist():
            block = self.blocks[number]
            if pool and num_bytes + block.num_bytes > self.memory // 2:
                yield _shuffled(np.concatenate(pool), order)
                pool, num_bytes = [], 0
            pool.append(rows_within(self.rows, block.start, block.stop))
            num_bytes += block.num_bytes
        yield _shuffled(np.concatenate(pool), order)

    def _read_ahead(self, pools: Iterator[np.ndarray]) -> Generator[EncodedRow, None, None]:
        """Yield the encoded images of the pools in order. The next pool is read while one is used."""
        with ThreadPoolExecutor(1) as reader:
            current: Future[deque[EncodedRow]] | None = None
            for pool in pools:
                following = reader.submit(self._read, pool)
                if current is not None:
                    yield from _released(current.result())
                current = following
            if current is not None:
                yield from _released(current.result())

    def _read(self, rows: np.ndarray) -> deque[EncodedRow]:
        """Return the encoded images of ``rows``, in this order. They are read in the order of the files."""
        order, slabs = np.argsort(rows), _Slabs(max(_SLAB, self.memory >> 8))
        read = [
            (row, (where, source if isinstance(source, Path) else slabs.copy(source)))
            for row, (where, source) in zip(rows[order].tolist(), self.encoded.read(rows[order]), strict=True)
        ]
        return deque(read[place] for place in np.argsort(order).tolist())

    def _decoded(self, encoded: Iterator[EncodedRow], sizes: Iterable[int]) -> Generator[DecodedRows, None, None]:
        """Yield the images in parts of ``sizes``. One part is decoded ahead of use, or more if parts are small."""
        pending: deque[Pending] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for size in sizes:
                    pending.append(self._start_decoding(pool, list(islice(encoded, size))))
                    if len(pending) > 1 + 2 * self.threads // size:
                        yield _finished(pending.popleft())
                while pending:
                    yield _finished(pending.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _start_decoding(self, pool: ThreadPoolExecutor, encoded: list[EncodedRow]) -> Pending:
        on_gpu = torch.device(self.device).type == "cuda"
        images = torch.empty((len(encoded), *self.shape), dtype=torch.uint8, pin_memory=on_gpu)
        sources = [source for _, source in encoded]
        step = min(_TASK, -(-len(encoded) // self.threads))
        # Each task writes its own slice, so that neither threads nor timing change the images.
        futures = [
            pool.submit(self._decode_into, images[start : start + step].numpy(), sources[start : start + step])
            for start in range(0, len(encoded), step)
        ]
        return (images, np.array([row for row, _ in encoded])), futures

    def _decode_into(self, pixels: np.ndarray, encoded: Sequence[Encoded]) -> None:
        for position, image in enumerate(encoded):
            pixels[position] = self.form.fit(decode(image, self.size), image[0])


def training_source(images: ImageSet | Stream, device: torch.device | str, rank: int, processes: int) -> TrainingImages:
    """Return the source of batches for a training stage: a stream to ``device``, or images in memory there."""
    if isinstance(images, Stream):
        return replace(images, device=device, rank=rank, processes=processes)
    return Resident(images, device, rank, processes)


class _Slabs:
    """Copies of bytes in slabs of ``size``, which return to the system when no view of them is left.

    Thousands of single objects would fragment the heap, so that a process would hold far more than they take.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = memoryview(b"")

    def copy(self, content: bytes | memoryview) -> memoryview:
        """Copy ``content`` into the current slab or a new one, and return a view of the copy."""
        if len(content) > len(self._free):
            self._free = memoryview(mmap(-1, max(self._size, len(content))))
        view, self._free = self._free[: len(content)], self._free[len(content) :]
        view[:] = content
        return view


def open_stream(
    name_or_path: str | os.PathLike[str],
    split: str,
    *,
    root: Root = None,
    size: int | None = None,
    memory: int = 1 << 30,
    threads: int | None = None,
) -> Stream:
    """Open a split in a folder of parquet shards or of image files as a stream.

    File names, metadata and labels are read, and up to 64 images are decoded: the set is taken to be greyscale if all
    of these are.

    Args:
        name_or_path, split, root, size: as in ``load_images``. A data set known by name must lie in ``root`` as shards.
        memory: bytes of encoded images to hold, per process.
        threads: number of decoding threads. None means one per processor, at most eight.

    Raises:
        DataError: as ``load_images``, or the data are not stored image by image.
        InputError: a wrong ``size`` or ``root``.
        ConfigError: ``memory`` is below 1.
    """
    check_size(size)
    if memory < 1:
        raise ConfigError(f"memory must be an integer >= 1, got {memory!r}")
    encoded = open_encoded(name_or_path, split, root)
    if encoded is None:
        raise DataError(
            f"{name_or_path} can only be loaded as a whole: streams are made of parquet shards or image files; "
            "let it fit in memory (data.memory_gb, data.size) or store it as one of these"
        )
    check_several_classes(encoded.labels, encoded.classes, split, f"{os.fspath(name_or_path)} ({split})")
    blocks = encoded.blocks(max(1, memory // 2))
    form, rows = _form(encoded, blocks, size), np.arange(len(encoded))
    return Stream(encoded, form, encoded.labels, rows, blocks, size, memory, threads or num_threads())


def _form(images: EncodedImages, blocks: Sequence[Block], size: int | None) -> Form:
    """Return the shape of the first image, in colour if one of the first images or of those that begin a block is."""
    begins = [blocks[int(number)].start for number in np.linspace(0, len(blocks) - 1, min(_PROBED, len(blocks)))]
    probed = np.union1d(np.arange(min(_PROBED, len(images))), begins)
    form: Form | None = None
    for encoded in images.read(probed):
        image = decode(encoded, size)
        form = form or Form((1, *image.shape[1:]), encoded[0])
        if len(image) == 3:
            return replace(form, shape=(3, *form.shape[1:]))
    assert form is not None
    return form


def _shares(pools: Sequence[np.ndarray], positions: range, batch_size: int, share: slice) -> Iterator[np.ndarray]:
    """Yield the rows of each pool at these positions of the epoch that are in this process's share of their batch."""
    start = 0
    for pool in pools:
        position = np.arange(start, start + len(pool))
        in_batch = position % batch_size
        in_epoch = (position >= positions.start) & (position < positions.stop)
        yield pool[in_epoch & (in_batch >= share.start) & (in_batch < share.stop)]
        start += len(pool)


def _shuffled(rows: np.ndarray, generator: torch.Generator) -> np.ndarray:
    return rows[torch.randperm(len(rows), generator=generator).numpy()]


def _finished(pending: Pending) -> DecodedRows:
    """Wait for the images and return them, or raise the DataError of the first that could not be decoded."""
    images, futures = pending
    for future in futures:
        future.result()
    return images


def _released(encoded: deque[EncodedRow]) -> Iterator[EncodedRow]:
    """Yield the entries in order and drop each, so that a pool shrinks as it is used."""
    while encoded:
        yield encoded.popleft()
