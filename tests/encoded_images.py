"""Encoded images, and parquet shards of them."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(pixels: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    """Return ``pixels`` (H, W) or (H, W, 3) as a PNG file, converted to a mode of Pillow's."""
    buffer = BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def image_column(contents: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> pa.Array:
    """Return encoded images as the column of a shard, without paths if none are given."""
    paths = paths or [None] * len(contents)
    return pa.array([{"bytes": content, "path": path} for content, path in zip(contents, paths, strict=True)], STRUCT)


def class_names(names: Any, label: str = "label") -> bytes:
    """Return the metadata "huggingface" that name the classes of the column ``label``."""
    return json.dumps({"info": {"features": {label: {"_type": "ClassLabel", "names": names}}}}).encode()


def write_shard(path: Path, columns: dict[str, Any], metadata: bytes | None = None, **options: Any) -> Path:
    """Write a shard of these columns, with metadata as ``class_names`` makes them, and return its path."""
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path
