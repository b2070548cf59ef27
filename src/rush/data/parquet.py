"""Hugging Face style parquet shards: an image column of encoded files, a label column, class names in the schema metadata."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rush.data.decoding import Encoded, decode_images
from rush.data.images import ImageSet, check_labels
from rush.errors import DataError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
_SERIES = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")
_BATCH = 1024


def parquet_folder(folder: Path) -> Path | None:
    """``folder`` or the one sub-folder of it (such as ``data``) that holds .parquet files; None without any.

    Raises: DataError when several sub-folders do.
    """
    if any(folder.glob("*.parquet")):
        return folder
    holding = sorted({path.parent for path in folder.glob("*/*.parquet")})
    if len(holding) > 1:
        raise DataError(
            f"{folder} has parquet files in {', '.join(path.name for path in holding)}; give the one you mean, e.g. {holding[0]}"
        )
    return holding[0] if holding else None


def load_parquet(folder: Path, split: str, name: str) -> ImageSet:
    """The rows of all shards ``split``-*.parquet (or of ``split``.parquet) in ``folder``, in order.

    ids: the ``path`` beside the image bytes where every row has one and all differ, else "<split>-<row>". Without class names in
    the metadata the classes are "0".."K-1" with K - 1 the largest label; without a label column labels are None.
    Raises: DataError naming the shard that is missing, damaged, empty, mislabelled or of another layout.
    """
    shards = [_open_shard(path) for path in find_shards(folder, split)]
    odd = next(
        (shard for shard in shards if (shard.label, shard.classes) != (shards[0].label, shards[0].classes)), None
    )
    if odd is not None:
        raise DataError(
            f"{odd.path} has another label column or other class names than {shards[0].path}; get both from one source"
        )
    labels = [_labels(shard) for shard in shards] if shards[0].label else None
    classes = shards[0].classes or _numbered(labels)
    checked = None
    if labels is not None:
        for shard, values in zip(shards, labels, strict=True):
            check_labels(values, shard.rows, len(classes), str(shard.path))
        checked = check_labels(np.concatenate(labels), sum(shard.rows for shard in shards), len(classes), str(folder))
    images = decode_images((item for shard in shards for item in _encoded(shard)), sum(shard.rows for shard in shards))
    return ImageSet(images, checked, classes, _ids(shards, split), name, split)


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of ``split`` in ``folder``, in order. Raises: DataError without any, or naming the missing one of a series."""
    shards = sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))
    if not shards:
        splits = sorted({re.split(r"[-.]", path.name)[0] for path in folder.glob("*.parquet")})
        raise DataError(
            f"{folder} has no shard {split}-*.parquet, only of {', '.join(splits)}; ask for one of these splits or add the shard"
        )
    series = [match for match in (_SERIES.search(path.name) for path in shards) if match]
    for total in {match[2] for match in series}:
        present = {int(match[1]) for match in series if match[2] == total}
        missing = [number for number in range(int(total)) if number not in present]
        if missing:
            name = f"{split}-{missing[0]:0{len(total)}d}-of-{total}.parquet"
            raise DataError(
                f"{folder / name} is missing ({len(missing)} of {int(total)} shards of split {split!r} are); get it again"
            )
    if (
        len(series) not in (0, len(shards))
        or len({match[2] for match in series}) > 1
        or len({match[1] for match in series}) < len(series)
    ):
        raise DataError(
            f"{folder} mixes several series of shards: {', '.join(path.name for path in shards)}; keep one of them"
        )
    return shards


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    image: str
    label: str | None
    classes: tuple[str, ...] | None
    has_paths: bool


def _open_shard(path: Path) -> _Shard:
    import pyarrow as pa

    with _parquet(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    image = next((column for column in IMAGE_COLUMNS if column in schema.names), None)
    kind = schema.field(image).type if image else None
    if image is None or not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(
            f"{path} has the columns {dict(zip(schema.names, map(str, schema.types), strict=True))}; it needs 'img' or 'image', a struct of bytes and path"
        )
    label = next((column for column in LABEL_COLUMNS if column in schema.names), None)
    if label is None and any("label" in column for column in schema.names):
        raise DataError(
            f"{path} has the columns {schema.names}; name its label column 'label' or 'fine_label', or remove it"
        )
    if rows == 0:
        raise DataError(f"{path} is empty; get it again or remove it")
    return _Shard(
        path, rows, image, label, _class_names(schema.metadata or {}, label, path), kind.get_field_index("path") >= 0
    )


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The opened shard; whatever pyarrow raises becomes a DataError that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; it is truncated or no parquet file: delete it and get it again"
        ) from error


def _class_names(metadata: dict[bytes, bytes], label: str | None, path: Path) -> tuple[str, ...] | None:
    if b"huggingface" not in metadata or label is None:
        return None
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"].get(label, {}).get("names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: the schema metadata 'huggingface' has no info.features ({error}); write it again or drop it"
        ) from error
    return tuple(names) if names else None


def _numbered(labels: list[np.ndarray] | None) -> tuple[str, ...]:
    return tuple(str(label) for label in range(max(int(values.max()) for values in labels) + 1)) if labels else ()


def _labels(shard: _Shard) -> np.ndarray:
    with _parquet(shard.path) as file:
        column = file.read(columns=[shard.label]).column(0)
    if column.null_count:
        raise DataError(f"{shard.path} has {column.null_count} rows without a {shard.label}; label or remove them")
    return column.to_numpy()


def _encoded(shard: _Shard) -> Iterator[Encoded]:
    with _parquet(shard.path) as file:
        row = 0
        for batch in file.iter_batches(_BATCH, columns=[f"{shard.image}.bytes"]):
            for content in batch.column(0).field("bytes").to_pylist():
                if content is None:
                    raise DataError(f"{shard.path} row {row} has no image bytes; embed the image or remove the row")
                yield f"{shard.path} row {row}", content
                row += 1


def _ids(shards: list[_Shard], split: str) -> np.ndarray:
    paths: list[str | None] = []
    for shard in shards:
        if shard.has_paths:
            with _parquet(shard.path) as file:
                paths += file.read(columns=[f"{shard.image}.path"]).column(0).combine_chunks().field("path").to_pylist()
        else:
            paths += [None] * shard.rows
    unique = None not in paths and len(set(paths)) == len(paths)
    return np.array(paths if unique else [f"{split}-{row:05d}" for row in range(len(paths))], dtype=str)
