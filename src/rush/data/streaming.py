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

from rush.data.batches import Batch, Resident, TrainingImages, batches_per_epoch, own_rows
from rush.data.images import ImageSet, held_out_rows
from rush.data.labels import check_several_classes
from rush.data.readers.decoding import Encoded, Form, decode
from rush.data.readers.records import Block, Records
from rush.data.readers.resizing import check_size, num_threads
from rush.data.readers.roots import Root
from rush.data.sources import open_records
from rush.errors import ConfigError, DataError
from rush.runtime.numbers import as_whole
from rush.runtime.transfer import sent

_TASK = 16  # images that a thread decodes at a time, at most
_FILES = 4096  # names of image files that are handed to the threads at a time
_PROBED = 32  # images looked at to tell whether the set is greyscale
_HELD_OUT = 256  # held-out images that are decoded at a time
_SLAB = 1 << 20  # bytes
Located = tuple[int, Encoded]
"""A row and its encoded image."""
Decoded = tuple[torch.Tensor, np.ndarray]
"""Images uint8 (n, C, H, W) and their rows (n,)."""


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    """The images of a split that are read and decoded anew in every epoch; a ``TrainingImages``.

    records: where they lie. form: the shape they are decoded to. labels: int64, of all rows of ``records``, or None.
    rows: which of them belong to the stream, ascending. size: as in ``load_images``. memory: bytes of encoded images
    that are held at once. device: where batches go. rank, processes: this process and their number. threads: that
    decode; no result depends on it.

    **Order.** If the encoded images fit in ``memory``, or are files of their own, an epoch is one uniform permutation
    of the images, the one of ``Resident``. Else the blocks (row groups of the shards) are put in random order, as many
    as fit in half of ``memory`` are pooled and shuffled, and while one pool is used up the next is read. So images
    far apart in the files meet in a batch only if their blocks do: where shards are sorted by class, ``memory`` should
    hold many blocks.

    **Memory.** At most ``memory`` bytes of encoded images, the batch returned and the one decoded ahead of it, a few
    megabytes of the files' readers, 8 bytes a row for labels and the order; nothing grows with the length of the
    training.
    """

    records: Records
    form: Form
    labels: torch.Tensor | None
    rows: np.ndarray
    size: int | None
    memory: int
    device: torch.device | str = "cpu"
    rank: int = 0
    processes: int = 1
    threads: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.shape)
        labelled = f"{self.num_classes} classes" if self.labels is not None else "no labels"
        return f"Stream({self.name}/{self.split}: {len(self)} images of {shape}, {labelled})"

    @property
    def name(self) -> str:
        return self.records.name

    @property
    def split(self) -> str:
        return self.records.split

    @property
    def classes(self) -> tuple[str, ...]:
        return self.records.classes

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.form.shape

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the names and sizes of the files, the shape, the rows and the labels; not over pixels."""
        files = [[file.name, os.stat(file).st_size] for file in self.records.files()]
        digest = hashlib.sha256(json.dumps(["stream", files, self.shape]).encode())
        digest.update(self.rows.astype("<i8").tobytes())
        digest.update(b"unlabelled" if self.labels is None else self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def without_labels(self) -> "Stream":
        """The same images with ``labels`` None: what pre-training is given, so that it cannot read them."""
        return replace(self, labels=None)

    def holding_out(self, count: int, generator: torch.Generator) -> tuple["Stream", ImageSet]:
        """The stream without the images that ``hold_out`` would draw, and these, decoded into memory.

        Raises: InputError for a count that is not in 1..N-1; DataError naming an image that cannot be decoded.
        """
        labels = None if self.labels is None else self.labels[self.rows]
        drawn = held_out_rows(labels, len(self), count, generator)
        rows = self.rows[drawn]
        parts = [len(part) for part in np.array_split(rows, -(-count // _HELD_OUT))]
        located = zip(rows.tolist(), self.records.read(rows), strict=True)
        with closing(self._decoded(located, parts)) as decoded:
            pixels = torch.cat([images for images, _ in decoded])
        held = ImageSet(
            pixels,
            None if labels is None else labels[drawn],
            self.classes,
            self.records.ids()[rows],
            self.name,
            self.split,
        )
        return replace(self, rows=np.delete(self.rows, drawn)), held

    def batches(self, order: torch.Generator, batch_size: int, first: int = 0) -> Iterator[Batch]:
        """As ``TrainingImages.batches``: a function of ``order``, ``batch_size``, ``memory`` and the files alone.

        Batches before ``first`` are neither read nor decoded. Raises: ConfigError for an impossible ``batch_size``;
        DataError, in its turn, naming an image that cannot be decoded or is of another size.
        """
        per_epoch, own = batches_per_epoch(len(self), batch_size), own_rows(batch_size, self.rank, self.processes)
        places = range(first * batch_size, per_epoch * batch_size)
        pools = self._own(list(self._pools(order)), places, batch_size, own)
        shares = repeat(own.stop - own.start, per_epoch - first)
        with (
            closing(self._read_ahead(pools)) as located,
            closing(self._decoded(located, shares)) as decoded,
        ):
            for images, rows in decoded:
                labels = None if self.labels is None else sent(self.labels[rows], self.device)
                yield Batch(sent(images, self.device), labels)

    def _pools(self, order: torch.Generator) -> Iterator[np.ndarray]:
        """All rows once, in the order of the epoch, in pools that are read at once."""
        total = sum(block.held for block in self._blocks)
        if total <= self.memory:
            rows = _shuffled(self.rows, order)
            step = _FILES if total == 0 else len(rows)
            yield from (rows[start : start + step] for start in range(0, len(rows), step))
            return
        pool: list[np.ndarray] = []
        held = 0
        for number in torch.randperm(len(self._blocks), generator=order).tolist():
            block = self._blocks[number]
            if pool and held + block.held > self.memory // 2:
                yield _shuffled(np.concatenate(pool), order)
                pool, held = [], 0
            pool.append(self.rows[slice(*np.searchsorted(self.rows, [block.start, block.stop]))])
            held += block.held
        yield _shuffled(np.concatenate(pool), order)

    @cached_property
    def _blocks(self) -> list[Block]:
        return self.records.blocks(self.memory // 2)

    @staticmethod
    def _own(pools: Sequence[np.ndarray], places: range, batch_size: int, own: slice) -> Iterator[np.ndarray]:
        """Of each pool the rows at ``places`` of the epoch that are this process's part of their batch."""
        start = 0
        for pool in pools:
            place = np.arange(start, start + len(pool))
            row = place % batch_size
            yield pool[(place >= places.start) & (place < places.stop) & (row >= own.start) & (row < own.stop)]
            start += len(pool)

    def _read_ahead(self, pools: Iterator[np.ndarray]) -> Generator[Located, None, None]:
        """The encoded images of the pools in their order; the next pool is read while one is handed out."""
        with ThreadPoolExecutor(1) as reader:
            current: Future[list[Located | None]] | None = None
            for pool in pools:
                following = reader.submit(self._read, pool)
                if current is not None:
                    yield from _handed_out(current.result())
                current = following
            if current is not None:
                yield from _handed_out(current.result())

    def _read(self, rows: np.ndarray) -> list[Located | None]:
        located: list[Located | None] = [None] * len(rows)
        places, shelf = np.argsort(rows), _Shelf(max(_SLAB, self.memory >> 8))
        for place, (where, source) in zip(places.tolist(), self.records.read(rows[places]), strict=True):
            kept = source if isinstance(source, Path) else shelf.put(source)
            located[place] = int(rows[place]), (where, kept)
        return located

    def _decoded(self, located: Iterator[Located], counts: Iterable[int]) -> Generator[Decoded, None, None]:
        """The next ``counts`` images each time, one such part decoded ahead of use (more if it is few images)."""
        waiting: deque[tuple[Decoded, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for count in counts:
                    waiting.append(self._begun(pool, list(islice(located, count))))
                    if len(waiting) > 1 + 2 * self.threads // count:
                        yield _finished(waiting)
                while waiting:
                    yield _finished(waiting)
            finally:
                pool.shutdown(cancel_futures=True)

    def _begun(self, pool: ThreadPoolExecutor, located: list[Located]) -> tuple[Decoded, list[Future[None]]]:
        """The images of ``located``, which the threads of ``pool`` will have filled in when the futures are done."""
        images = torch.empty((len(located), *self.shape), dtype=torch.uint8, pin_memory=self._on_gpu)
        rows = np.array([row for row, _ in located])
        encoded = [encoded for _, encoded in located]
        step = min(_TASK, -(-len(located) // self.threads))
        starts = range(0, len(located), step)
        futures = [pool.submit(self._fill, images[at : at + step].numpy(), encoded[at : at + step]) for at in starts]
        return (images, rows), futures

    def _fill(self, pixels: np.ndarray, encoded: Sequence[Encoded]) -> None:
        for place, image in enumerate(encoded):
            pixels[place] = self.form.fit(decode(image, self.size), image[0])

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def training_source(images: ImageSet | Stream, device: torch.device | str, rank: int, processes: int) -> TrainingImages:
    """What a training draws from: a stream as it is, images in memory on ``device``."""
    return images if isinstance(images, Stream) else Resident(images, device, rank, processes)


class _Shelf:
    """Bytes copied into slabs of ``size`` that go back to the system when no view of them is left.

    Thousands of single objects would leave the heap in pieces, so that a process would hold far more than they take.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._left = memoryview(b"")

    def put(self, content: bytes | memoryview) -> memoryview:
        """A view of the copy."""
        if len(content) > len(self._left):
            self._left = memoryview(mmap(-1, max(self._size, len(content))))
        kept, self._left = self._left[: len(content)], self._left[len(content) :]
        kept[:] = content
        return kept


def open_stream(
    name_or_path: str | os.PathLike[str],
    split: str,
    *,
    root: Root = None,
    size: int | None = None,
    memory: int = 1 << 30,
    device: torch.device | str = "cpu",
    rank: int = 0,
    processes: int = 1,
    threads: int | None = None,
) -> Stream:
    """The images of ``split`` (or several, joined by "+") in a folder of parquet shards or of image files, streamed.

    Names and paths, ``root`` and ``size`` as in ``load_images``; a data set known by name must lie in ``root`` as
    parquet shards. ``memory``: bytes of encoded images to hold, per process. ``threads``: that decode; None: one per
    processor, at most eight. The rest as in ``Stream``. Reads file names, metadata and labels, and decodes up to 64
    images: the set is taken for greyscale if all of them are.

    Raises: DataError as ``load_images``, or where there is nothing to stream from; ConfigError for a wrong ``memory``,
    ``rank``, ``processes`` or ``threads``.
    """
    check_size(size)
    _check_whole("memory", memory, 1)
    _check_whole("processes", processes, 1)
    _check_whole("rank", rank, 0, processes - 1)
    threads = num_threads() if threads is None else threads
    _check_whole("threads", threads, 1)
    records = open_records(name_or_path, split, root)
    if records is None:
        raise DataError(
            f"{name_or_path} can only be loaded as a whole: streams are made of parquet shards or image files; "
            "let it fit in memory (data.memory_gb, data.size) or store it as one of these"
        )
    check_several_classes(records.labels, records.classes, split, f"{os.fspath(name_or_path)} ({split})")
    stream = Stream(
        records,
        Form((1, 1, 1), ""),
        records.labels,
        np.arange(len(records)),
        size,
        memory,
        device,
        rank,
        processes,
        threads,
    )
    return replace(stream, form=_form(records, stream._blocks, size))


def _form(records: Records, blocks: Sequence[Block], size: int | None) -> Form:
    """The shape of the first image, in colour if any of the first ones or of those that begin a block is."""
    begins = [blocks[int(number)].start for number in np.linspace(0, len(blocks) - 1, min(_PROBED, len(blocks)))]
    probed = np.union1d(np.arange(min(_PROBED, len(records))), begins)
    form: Form | None = None
    for encoded in records.read(probed):
        image = decode(encoded, size)
        form = form or Form((1, *image.shape[1:]), encoded[0])
        if len(image) == 3:
            return replace(form, shape=(3, *form.shape[1:]))
    assert form is not None
    return form


def _shuffled(rows: np.ndarray, generator: torch.Generator) -> np.ndarray:
    return rows[torch.randperm(len(rows), generator=generator).numpy()]


def _finished(waiting: deque[tuple[Decoded, list[Future[None]]]]) -> Decoded:
    """The first part, decoded. Raises: DataError of the first of its images that could not be."""
    decoded, futures = waiting.popleft()
    for future in futures:
        future.result()
    return decoded


def _handed_out(located: list[Located | None]) -> Iterator[Located]:
    """The entries in order; each is let go of, so that a pool shrinks as it is used."""
    for place, entry in enumerate(located):
        located[place] = None
        assert entry is not None
        yield entry


def _check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    whole = as_whole(value)
    if whole is None or whole < least or (most is not None and whole > most):
        bounds = f">= {least}" if most is None else f"in {least}..{most}"
        raise ConfigError(f"{name} must be an integer {bounds}, got {value!r}")
