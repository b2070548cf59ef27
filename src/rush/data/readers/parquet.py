"""Hugging Face style parquet shards: a column of encoded images, a label column, class names in the schema metadata.

Everything that a shard's metadata claim is checked before it is used, since a damaged file can make pyarrow allocate
what it claims, or end the process.
"""

import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rush.data.images import numbered_ids
from rush.data.indexing import rows_within, split_rows
from rush.data.labels import check_class_names, check_labels, number_classes
from rush.data.readers.damage import name_damage
from rush.data.readers.decoding import MAX_BYTES, Encoded
from rush.data.readers.encoded import Block
from rush.data.readers.entries import describe_kind, list_entries, warn_of_omitted
from rush.data.readers.roots import joined_names
from rush.errors import DataError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
_SERIES = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")
_BATCH = 1024  # most rows taken out of a row group at a time
_BATCH_BYTES = 1 << 20  # most bytes taken out of a row group at a time, and read ahead of it
_FREE_ROWS = 1 << 20  # number of rows allowed in any shard; beyond it, one row per byte of the file
_ROW_BYTES = 256  # what Python adds per image held in memory: its name for error messages, and objects


def parquet_folder(folder: Path) -> Path | None:
    """Return the folder with shards: ``folder`` or its sub-folder data, plain_text or of the same name, or None."""
    candidates = (folder, folder / "data", folder / "plain_text", folder / folder.name)
    return next((path for path in candidates if any(path.glob("*.parquet"))), None)


@dataclass(frozen=True, eq=False)
class ParquetImages:
    """The rows of all shards of a split, in order, an ``EncodedImages``."""

    shards: tuple["_Shard", ...]
    name: str
    split: str
    classes: tuple[str, ...]
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def ids(self) -> np.ndarray:
        """Return the ``path`` beside the image bytes if every row has one and all differ, else "<split>-<row>"."""
        paths: list[str | None] = []
        for shard in self.shards:
            paths += _paths(shard) if shard.has_paths else [None] * shard.rows
        unique = None not in paths and len(set(paths)) == len(paths)
        return np.array(paths, dtype=str) if unique else numbered_ids(self.split, len(paths))

    def files(self) -> list[Path]:
        return [shard.path for shard in self.shards]

    def blocks(self, limit: int) -> list[Block]:
        """Return the row groups. One of more than ``limit`` bytes is divided into equal parts."""
        blocks: list[Block] = []
        for shard in self.shards:
            for group in shard.groups:
                blocks += _blocks(shard.path, group, limit, blocks[-1].stop if blocks else 0)
        return blocks

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        """Yield the encoded images of the ascending ``rows``. A row group is read as far as the last of them."""
        for number, rows_of_shard in split_rows(rows, [shard.rows for shard in self.shards]):
            shard = self.shards[number]
            with _parquet(shard.path) as file:
                for group, rows_of_group in split_rows(rows_of_shard, [group.rows for group in shard.groups]):
                    yield from _read_group(file, shard, group, rows_of_group + shard.groups[group].start)


def open_shards(folders: Sequence[Path], split: str, name: str) -> ParquetImages:
    """Open all shards ``split``-*.parquet (or ``split``.parquet) of ``folders``, in order. No pixels are read.

    Shards in several folders are joined as if they lay in one. Labels are integers, or None without a label column.
    Without class names in the metadata, the classes are "0".."K-1", where K - 1 is the largest label of all splits in
    ``folders``. Other entries of the folders, except notes, are omitted with a DataWarning.

    Raises:
        DataError: a shard is missing, in two folders, damaged, empty, mislabelled or of a different layout, or another
            split names different classes. The message names the shard.
    """
    for folder in folders:
        strays = [Path(entry.path) for entry in list_entries(folder) if not entry.name.endswith(".parquet")]
        warn_of_omitted(folder, strays, "parquet shards")
    shards = tuple(_open_shard(path) for path in find_shards(folders, split))
    for shard in shards:
        if (shard.label, shard.classes) != (shards[0].label, shards[0].classes):
            raise DataError(
                f"{shard.path} has a different label column or different classes from {shards[0].path}; use one source"
            )
    labels = [_labels(shard) for shard in shards] if shards[0].label else []
    others = list(_other_shards(folders, shards)) if labels else []
    _check_same_names(shards[0], others)
    classes = shards[0].classes or number_classes([*labels, *map(_labels, others)], joined_names(folders))
    checked = [
        check_labels(values, shard.rows, len(classes), str(shard.path))
        for shard, values in zip(shards, labels, strict=bool(labels))
    ]
    return ParquetImages(shards, name, split, classes, torch.cat(checked) if checked else None)


def _other_shards(folders: Sequence[Path], shards: Sequence["_Shard"]) -> Iterator["_Shard"]:
    """Yield the labelled shards of the other splits: the first of each split if classes are named, else all.

    An unreadable shard is skipped. Loading its own split reports it.
    """
    visited = {_split_of(shards[0].path)}
    for path in sorted(set(_glob(folders)) - {shard.path for shard in shards}, key=lambda path: (path.name, path)):
        split = _split_of(path)
        if shards[0].classes and split in visited:
            continue
        visited.add(split)
        with suppress(DataError):
            other = _open_shard(path)
            if other.label == shards[0].label:
                yield other


def _check_same_names(shard: "_Shard", others: Sequence["_Shard"]) -> None:
    """Raise DataError if another split names different classes, so that one label would mean two of them."""
    for other in others:
        if other.classes != shard.classes:
            other_names, names = (reprlib.repr(list(each.classes or "none")) for each in (other, shard))
            raise DataError(
                f"{other.path} names the classes {other_names}, {shard.path} names {names}; give all splits the same "
                "names in the same order"
            )


def find_shards(folders: Sequence[Path], split: str) -> list[Path]:
    """Return the shards of ``split`` in ``folders``, in order.

    Raises:
        DataError: there are none, or one is missing or lies in two folders. The message names it.
    """
    single = [path for path in _glob(folders) if path.name == f"{split}.parquet"]
    numbered = sorted(_glob(folders, f"{split}-"), key=_by_numbers)
    if single and numbered:
        raise _mixed(folders, [single[0], numbered[0]])
    shards = numbered or single
    if not shards:
        splits = sorted(set(map(_split_of, _glob(folders))))
        raise DataError(
            f"{joined_names(folders)}: no shard {split}-*.parquet, only of {', '.join(splits)}; "
            "give one of these splits or add the shard"
        )
    _check_series(folders, split, shards)
    return shards


def _check_series(folders: Sequence[Path], split: str, shards: Sequence[Path]) -> None:
    """Raise DataError if a shard is missing or lies in two folders, or if several series are mixed."""
    for first, second in pairwise(shards):
        if first.name == second.name:
            raise DataError(f"{first.name} lies in {first.parent} and in {second.parent}; remove one of the two")
    series = [match for match in (_SERIES.search(path.name) for path in shards) if match]
    totals = {match[2] for match in series}
    numbers = {int(match[1]) for match in series}
    if len(totals) > 1 or len(series) not in (0, len(shards)) or len(numbers) < len(series):
        raise _mixed(folders, shards)
    for total in totals:
        missing = [number for number in range(int(total)) if number not in numbers]
        if missing:
            raise DataError(
                f"{split}-{missing[0]:0{len(total)}d}-of-{total}.parquet is missing ({len(missing)} of the "
                f"{int(total)} shards are) in {joined_names(folders)}; get it again, or name the folder that holds it"
            )


def _mixed(folders: Sequence[Path], shards: Sequence[Path]) -> DataError:
    names = ", ".join(path.name if len(folders) == 1 else str(path) for path in shards)
    return DataError(f"{joined_names(folders)}: the shards are of several series: {names}; keep one of them")


def _glob(folders: Sequence[Path], prefix: str = "") -> list[Path]:
    """Return the shards whose names start with ``prefix``, which is not a pattern."""
    return [path for folder in folders for path in folder.glob("*.parquet") if path.name.startswith(prefix)]


def _split_of(path: Path) -> str:
    """Return the split that the name of a shard begins with."""
    return path.stem.partition("-")[0]


def _by_numbers(path: Path) -> tuple[list[str | int], str]:
    """Return a sort key that orders numbers in a file name by value and ignores the folder."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)], path.name


@dataclass(frozen=True)
class _Group:
    """A row group: its first row in the shard, number of rows, and bytes of all columns, mostly encoded images."""

    start: int
    rows: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.rows


@dataclass(frozen=True)
class _Shard:
    """One file: its row groups, the names of its image and label columns, and its class names, if any."""

    path: Path
    groups: tuple[_Group, ...]
    image: str
    label: str | None
    classes: tuple[str, ...] | None
    has_paths: bool

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)


def _open_shard(path: Path) -> _Shard:
    with _parquet(path) as file:  # around everything, since names in a damaged schema may not even be text
        return _checked_shard(file.schema_arrow, file.metadata, path)


def _checked_shard(schema: Any, metadata: Any, path: Path) -> _Shard:
    image = _image_column(schema, path)
    label = next((column for column in LABEL_COLUMNS if column in schema.names), None)
    if label is None and any("label" in column for column in schema.names):
        raise DataError(f"{path} has the columns {schema.names}; name its label column 'label' or 'fine_label'")
    if metadata.num_rows == 0:
        raise DataError(f"{path} is empty; get it again or remove it")
    if metadata.num_rows > max(_FREE_ROWS, path.stat().st_size):
        raise DataError(f"{path} claims {metadata.num_rows} rows in {path.stat().st_size} bytes; get it again")
    has_paths = schema.field(image).type.get_field_index("path") >= 0
    groups = tuple(_groups(metadata))
    if any(group.rows < 0 or group.size < 0 for group in groups) or groups[-1].stop != metadata.num_rows:
        raise DataError(
            f"{path} is damaged: its row groups do not have the {metadata.num_rows} rows claimed; get it again"
        )
    return _Shard(path, groups, image, label, _class_names(schema.metadata or {}, label, path), has_paths)


def _groups(metadata: Any) -> Iterator[_Group]:
    """Yield the row groups.

    Their size is that of all columns, of which the images are nearly everything: asking for the size of one column
    makes pyarrow end the process if the metadata are damaged.
    """
    start = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield _Group(start, group.num_rows, group.total_byte_size)
        start += group.num_rows


def _blocks(path: Path, group: _Group, limit: int, offset: int) -> list[Block]:
    """Return the group's rows, numbered from ``offset``, in the fewest equal parts of at most ``limit`` bytes."""
    size = group.size + _ROW_BYTES * group.rows
    parts = -(-size // limit)
    if parts > group.rows:
        raise DataError(
            f"{path} has images of about {group.size // group.rows} bytes, more than the {limit} bytes held at a "
            f"time; give at least {8 * size // group.rows} bytes of memory"
        )
    bounds = [group.rows * part // parts for part in range(parts + 1)]
    return [
        Block(offset + start, offset + stop, size * (stop - start) // group.rows) for start, stop in pairwise(bounds)
    ]


def _image_column(schema: Any, path: Path) -> str:
    import pyarrow as pa

    for column in IMAGE_COLUMNS:
        if column in schema.names:
            kind = schema.field(column).type
            if pa.types.is_struct(kind) and _holds_bytes(kind):
                return column
    columns = ", ".join(f"{name}: {kind}" for name, kind in zip(schema.names, schema.types, strict=True))
    raise DataError(
        f"{path} has the columns {columns}; it needs 'img' or 'image', a struct of bytes and path; rename or convert it"
    )


def _holds_bytes(kind: Any) -> bool:
    """Return whether the struct's field ``bytes`` is binary and its field ``path``, if any, is text."""
    import pyarrow as pa

    content, path = (
        kind.field(index).type if index >= 0 else None for index in map(kind.get_field_index, ("bytes", "path"))
    )
    is_text = path is None or pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)
    return content is not None and is_text and (pa.types.is_binary(content) or pa.types.is_large_binary(content))


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open the shard. Whatever pyarrow raises on a damaged one becomes a DataError that names it."""
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path} is {describe_kind(path)}, not a parquet file; remove it, or put the shard there")
    damage = name_damage(f"{path} cannot be read", "it is truncated or not a parquet file: delete it and get it again")
    with damage, pq.ParquetFile(path, buffer_size=_BATCH_BYTES, pre_buffer=False) as file:
        yield file


def _class_names(metadata: dict[bytes, bytes], label: str | None, path: Path) -> tuple[str, ...] | None:
    if b"huggingface" not in metadata or label is None:
        return None
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"].get(label, {}).get("names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: the schema metadata 'huggingface' has no info.features ({error or type(error).__name__}); write "
            "it again or drop it"
        ) from error
    return check_class_names(names, f"{path}: the schema metadata 'huggingface'") if names else None


def _labels(shard: _Shard) -> np.ndarray:
    """Return the labels of the shard as integers, or raise DataError for any other type, and for missing ones."""
    import pyarrow as pa

    with _parquet(shard.path) as file:
        kind = file.schema_arrow.field(shard.label).type
        if not pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise DataError(
                f"{shard.path} has labels of the type {kind} in {shard.label!r}; labels must be integers: store the "
                "class index of each image, and the names in the schema metadata"
            )
        column = file.read(columns=[shard.label], use_threads=False).column(0)
        if column.null_count:
            raise DataError(f"{shard.path} has {column.null_count} rows without a {shard.label}; label or remove them")
        return column.cast(kind.value_type).to_numpy() if pa.types.is_dictionary(kind) else column.to_numpy()


def _read_group(file: Any, shard: _Shard, number: int, rows: np.ndarray) -> Iterator[Encoded]:
    """Yield the images of the shard's ascending ``rows``, all in one group, reading a few pages at a time."""
    group = shard.groups[number]
    start, step = group.start, min(_BATCH, 1 + _BATCH_BYTES * group.rows // (group.size + 1))
    for batch in file.iter_batches(step, [number], [f"{shard.image}.bytes"], use_threads=False):
        column = batch.column(0).field("bytes")
        for row in rows_within(rows, start, start + len(column)).tolist():
            content = column[row - start].as_py()
            if content is None:
                raise DataError(f"{shard.path} row {row} has no image bytes; embed the image or remove the row")
            if len(content) > MAX_BYTES:
                raise DataError(
                    f"{shard.path} row {row} has {len(content)} bytes, at most {MAX_BYTES} are read; store it smaller"
                )
            yield f"{shard.path} row {row}", content
        start += len(column)
        if start > rows[-1]:
            return
    raise DataError(f"{shard.path} is damaged: it ends before row {rows[-1]} of {shard.rows}; get it again")


def _paths(shard: _Shard) -> list[str | None]:
    """Return the path beside each image of the shard, or raise DataError if their number is not that of the images."""
    with _parquet(shard.path) as file:
        column = file.read(columns=[f"{shard.image}.path"], use_threads=False).column(0).combine_chunks()
        paths: list[str | None] = column.field("path").to_pylist()
    if len(paths) != shard.rows:
        raise DataError(f"{shard.path} is damaged: it has {len(paths)} paths for {shard.rows} images; get it again")
    return paths
