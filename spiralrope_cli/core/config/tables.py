"""The images of a parquet or Arrow file, as Hugging Face data sets have them.

A parquet file is compressed in pages of many rows. It is written once as Arrow into the cache
folder, where each image lies as it is; this is also what `datasets` does.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.hub import cache_folder
from spiralrope_cli.core.config.tars import Listed
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.storage import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES, LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls")
"""Usual names of the columns, in the order in which they are looked for."""
ROWS = 256
"""Rows in memory while a parquet file is read."""


def read_table(path: Path) -> Listed:
    """The images of a parquet or Arrow file."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow, which is not installed", "pip install 'spiralrope[data]'"
        ) from error
    try:
        file = _as_arrow(path) if path.suffix == ".parquet" else path
        whole = pa.memory_map(str(file)).read_buffer()
        batches, schema = _batches(pa.BufferReader(whole))
        image = _column(path, schema, IMAGES)
        label = next((name for name in LABELS if name in schema.names), None)
        rows: list[tuple[int, int, str, str | int | None]] = []
        for batch in batches:
            column = batch.column(image)
            data = column.field("bytes") if pa.types.is_struct(column.type) else column
            labels = batch.column(label).to_pylist() if label else [None] * len(batch)
            for (first, size), each in zip(_spans(path, data, whole), labels, strict=True):
                rows.append((first, size, f"{path.name} row {len(rows)}", _class(each)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}"
        ) from error
    return Listed(file, rows, f"column {label}", _names(schema, label))


def _batches(source: Any) -> tuple[Any, pa.Schema]:
    """Record batches and schema, in the file format or the stream format of `datasets`."""
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        return stream, stream.schema
    return (file.get_batch(number) for number in range(file.num_record_batches)), file.schema


def _as_arrow(path: Path) -> Path:
    """The images of a parquet file as an Arrow file in the cache folder."""
    import pyarrow as pa
    import pyarrow.parquet

    stat = path.stat()
    key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]
    target = cache_folder() / "arrow" / f"{key}.arrow"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file, atomic_write(target) as beside:
        schema = file.schema_arrow
        kept = [name for name in schema.names if name in (*IMAGES, *LABELS)]
        schema = pa.schema([schema.field(name) for name in kept], schema.metadata)
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in file.iter_batches(ROWS, columns=kept):
                writer.write_batch(batch.cast(schema))
    return target


def _column(path: Path, schema: pa.Schema, names: tuple[str, ...]) -> str:
    if found := next((name for name in names if name in schema.names), None):
        return found
    raise DataError(
        f"{path} has no column of images: it has {', '.join(schema.names)}",
        f"name it {' or '.join(names)}",
    )


def _spans(path: Path, data: Any, whole: Any) -> list[tuple[int, int]]:
    """(offset in the file, size) of each value of a column of bytes."""
    import numpy as np
    import pyarrow as pa

    kinds = {pa.binary(): np.int32, pa.large_binary(): np.int64}
    if data.type not in kinds or data.null_count:
        raise DataError(
            f"{path} does not hold the bytes of all its images",
            "save the data set again with its images embedded, or use a folder of images",
        )
    if not len(data):
        return []
    _, ends, content = data.buffers()
    first = content.address - whole.address
    if not 0 <= first < whole.size:
        raise DataError(
            f"{path} is compressed", "save it as Arrow without compression, or as parquet"
        )
    ends = np.frombuffer(ends, kinds[data.type])[data.offset : data.offset + len(data) + 1]
    return list(zip((first + ends[:-1]).tolist(), np.diff(ends).tolist(), strict=True))


def _class(label: Any) -> str | int | None:
    """A class as number or name; Hugging Face has -1 where it is not known."""
    if isinstance(label, int):
        return label if label >= 0 else None
    return None if label is None else str(label)


def _names(schema: pa.Schema, label: str | None) -> list[str]:
    """The class names that `datasets` keeps in the metadata of the schema."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    return list(features.get(label, {}).get("names") or ())
