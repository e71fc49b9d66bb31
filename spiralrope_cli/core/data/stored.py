"""The images in tar, parquet and Arrow files: where each lies, listed once and kept in the cache.

Nothing is unpacked. A tar file may hold one tar file per class, as ImageNet's training images; one
folder per class; images alone, as ImageNet's validation images; or be a WebDataset shard, with
KEY.jpg beside KEY.cls or KEY.json. Parquet and Arrow files are those of Hugging Face data sets,
ArrayRecord and TFRecord files those of TensorFlow Datasets.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from spiralrope_cli.core.config.datasets import IMAGENET_NAME
from spiralrope_cli.core.config.option import one_of
from spiralrope_cli.core.data.listing import is_image, suffix_of
from spiralrope_cli.core.errors import DataError, first_line
from spiralrope_cli.core.storage import atomic_write, cache_folder, parse, write_whole

if TYPE_CHECKING:
    import pyarrow as pa

LONG = 1 << 30
"""Bytes of files whose images are not listed at once."""
ROWS_DECODED = 256
"""Rows in memory while a parquet file is read."""
LABEL_SUFFIXES, LABEL_KEYS = (".json", ".cls"), ("label", "cls")
"""Files of a WebDataset sample that hold its class, the last one counts; keys of that JSON."""
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
"""Usual names of the columns of a table, in the order in which they are looked for."""


class Listed(NamedTuple):
    """The images of a file."""

    file: Path  # where their bytes are
    rows: list[tuple[int, int, str, str | int | None]]  # (offset, size, name, class if known)
    labels_from: str  # in words
    class_names: list[str]  # empty: those that occur, or numbers


def list_stored(files: Sequence[Path]) -> dict[str, Any]:
    """The kept list of images: `address`, `label` of each, `classes` and `labels_from`."""
    from filelock import FileLock

    names = [str(path.absolute()) for path in files]
    stamp = [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in files)]
    key = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]
    kept = cache_folder() / "indexes" / f"{key}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not (index := _read(kept, stamp)):
        # The processes of another launcher all come here; one of them makes the list.
        with FileLock(kept.with_suffix(".lock")):
            index = _read(kept, stamp) or _make(kept, names, stamp)
    places = zip(index["file"], index["place"], strict=True)
    index["address"] = [f"{index['files'][file]}::{place}" for file, place in places]
    return index


def _read(kept: Path, stamp: list[list[int]]) -> dict[str, Any]:
    """The list of these files, empty if there is none or it is of other files."""
    try:
        index = parse(kept.read_text())
        fresh = index["stamp"] == stamp and all(Path(path).exists() for path in index["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return index if fresh else {}


def _make(kept: Path, names: list[str], stamp: list[list[int]]) -> dict[str, Any]:
    if (size := sum(size for size, _ in stamp)) >= LONG:
        sys.stderr.write(f"listing the images in {size >> 30} GiB of {names[0]}, once\n")
    index: dict[str, Any] = {"stamp": stamp, "files": [], "file": [], "place": [], "label": []}
    for number, name in enumerate(names):
        found = READERS[suffix_of(Path(name))](Path(name))
        index["files"].append(str(found.file))
        index |= {"labels_from": found.labels_from, "classes": found.class_names}
        for first, size, member, label in found.rows:
            index["file"].append(number)
            index["place"].append(f"{first}+{size}::{member}")
            index["label"].append(label)
    write_whole(kept, json.dumps(index))
    return index


# --- Tar files


def read_tar(path: Path) -> Listed:
    """The images of a tar file."""
    images: list[tuple[int, int, str]] = []
    labels: dict[str, str | int] = {}
    found: list[tuple[int, int, str, str | int | None]]
    try:
        with open(path, "rb") as file:
            for first, size, name in _members(file):
                stem, suffix = os.path.splitext(name)
                if is_image(os.path.basename(name)):
                    images.append((first, size, name))
                elif suffix in LABEL_SUFFIXES:
                    file.seek(first)
                    if (label := _label(file.read(size), suffix)) is not None:
                        labels[stem] = label
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a tar file: {error}",
            "it must be whole and not compressed: gunzip FILE.tar.gz; repeat a download that ended",
        ) from error
    common = os.path.commonpath([os.path.dirname(name) for *_, name in images]) if images else ""
    if labels:
        found = [(*image, labels.get(os.path.splitext(image[2])[0])) for image in images]
        return Listed(path, found, "its .cls and .json files", [])
    one = path.stem if IMAGENET_NAME.fullmatch(path.stem) else None  # train/n01440764.tar
    found = [(*image, one or _folder(image[2], common)) for image in images]
    found.sort(key=lambda row: (row[3] or "", row[2]))  # as class folders
    return Listed(path, found, "folders and tar files in it", [])


def _members(file: IO[bytes], base: int = 0, inside: str = "") -> Iterator[tuple[int, int, str]]:
    """(offset, size, name) of each file, also of those in tar files in it."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if not member.isreg() or member.issparse():
                continue
            first, name = base + member.offset_data, member.name.removeprefix("./")
            if name.endswith(".tar") and (inner := tar.extractfile(member)):
                yield from _members(inner, first, f"{inside}{name.removesuffix('.tar')}/")
            else:
                yield first, member.size, inside + name


def _label(content: bytes, suffix: str) -> str | int | None:
    """The class in a `.cls` or `.json` file of a sample."""
    if suffix == ".json":
        values = json.loads(content)
        found = next((values[key] for key in LABEL_KEYS if key in values), None)
        return found if isinstance(found, int) else None if found is None else str(found)
    word = content.decode().strip()
    return int(word) if word.isdecimal() else word


def _folder(name: str, common: str) -> str | None:
    """The class folder of an image below the folder that all images share."""
    first, *rest = os.path.relpath(name, common or ".").split(os.sep)
    return first if rest else None


# --- Parquet and Arrow


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
        image = _column(path, schema.names, IMAGE_COLUMNS)
        label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        rows: list[tuple[int, int, str, str | int | None]] = []
        for batch in batches:
            column = batch.column(image)
            data = column.field("bytes") if pa.types.is_struct(column.type) else column
            labels = batch.column(label).to_pylist() if label else [None] * len(batch)
            for (first, size), each in zip(_spans(path, data, whole), labels, strict=True):
                rows.append((first, size, f"{path.name} row {len(rows)}", _class(each)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as {path.suffix[1:]}: {first_line(error)}"
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
        kept = [name for name in schema.names if name in (*IMAGE_COLUMNS, *LABEL_COLUMNS)]
        schema = pa.schema([schema.field(name) for name in kept], schema.metadata)
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in file.iter_batches(ROWS_DECODED, columns=kept):
                writer.write_batch(batch.cast(schema))
    return target


def _column(path: Path, there: Sequence[str], names: tuple[str, ...]) -> str:
    if found := next((name for name in names if name in there), None):
        return found
    raise DataError(
        f"{path} has no column of images: it has {', '.join(there)}",
        f"name it {one_of(names)}",
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


# --- TensorFlow Datasets


def read_records(path: Path) -> Listed:
    """The images of an ArrayRecord or TFRecord file of TensorFlow Datasets, without TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{path} needs tensorflow_datasets, which is not installed",
            "pip install 'spiralrope[tfds]'",
        ) from error
    for name in ("dataset_info.json", "features.json"):
        if not (path.parent / name).is_file():
            raise DataError(
                f"{path} has no {name} beside it", "tensorflow_datasets tells by it what is there"
            )
    features = tfds.builder_from_directory(path.parent).info.features
    image = _column(path, list(features), IMAGE_COLUMNS)
    label = next((name for name in LABEL_COLUMNS if name in features), None)
    as_stored = {image: tfds.decode.SkipDecoding()}
    rows: list[tuple[int, int, str, str | int | None]] = []
    file = path if suffix_of(path) == ".tfrecord" else _as_tfrecord(path)
    for first, record in _records(file):
        values = features.deserialize_example_np(record, decoders=as_stored)
        place, known = first + record.index(values[image]), values.get(label)
        name = f"{path.name} record {len(rows)}"
        rows.append((place, len(values[image]), name, _class(known)))
    names = getattr(features[label], "names", None) if label else None
    return Listed(file, rows, f"feature {label}", list(names or ()))


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, content) of each record of a TFRecord file, which is not compressed."""
    with open(path, "rb") as file:
        while header := file.read(12):  # the size, and its checksum
            size, first = int.from_bytes(header[:8], "little"), file.tell()
            if len(header) < 12 or len(record := file.read(size)) < size or len(file.read(4)) < 4:
                raise DataError(f"{path} is truncated", "prepare the data set again")
            yield first, record


def _as_tfrecord(path: Path) -> Path:
    """The records of an ArrayRecord file, which are compressed, as a file in the cache folder."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    stat = path.stat()
    key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]
    target = cache_folder() / "records" / f"{key}.tfrecord"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        records = ArrayRecordDataSource([str(path)])
        with atomic_write(target) as beside, beside.open("wb") as file:
            for number in range(len(records)):
                record = records[number]
                file.write(len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4))
    return target


READERS = {
    ".tar": read_tar,
    **dict.fromkeys((".parquet", ".arrow"), read_table),
    **dict.fromkeys((".array_record", ".tfrecord"), read_records),
}
