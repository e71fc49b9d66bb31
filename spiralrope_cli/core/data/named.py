"""Data sets by name, as the folder in which they lie. No torch, unless one is unpacked.

Nothing is downloaded here: an error says by which command, or what to put where.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import tempfile
from pathlib import Path

from spiralrope_cli.core.config.datasets import NAMED, STREAM
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.progress import say
from spiralrope_cli.core.storage import atomic_write, cache_folder

CIFAR100 = "cifar-100-python"
"""Folder of CIFAR-100, as torchvision unpacks it."""
INAT = {"inat18": "2018", "inat19": "2019"}


def is_name(data: str) -> bool:
    """Whether it is the name of a set of images, not a path."""
    return data in NAMED or data.partition("/")[0] in ("hfds", "tfds", "wds")


def data_root(data: str) -> Path | str:
    """The folder that `--data` names: a path, or a data set by its name. A stream stays a name."""
    if STREAM.match(data):
        return data
    kind, _, rest = data.partition("/")
    if (given := Path(os.path.expanduser(data))).exists():
        holds_cifar = (given / CIFAR100).is_dir() or (given / f"{CIFAR100}.tar.gz").is_file()
        return _cifar100(given) if holds_cifar else given
    if data == "cifar100":
        return _cifar100(cache_folder())
    if data in INAT:
        return _inat(data)
    if kind == "wds":
        if "://" in rest:
            raise DataError(
                f"--data {data} is no URL of http, https or file",
                "use a command that writes a shard, such as 'wds/pipe:aws s3 cp URL -'",
            )
        return Path(os.path.expanduser(rest))
    found = {"hfds": _of_hub, "tfds": _of_tfds}.get(kind)
    return found(data, rest) if found else given


def _of_hub(data: str, rest: str) -> Path:
    """`hfds/OWNER/NAME[/CONFIG]`, in the cache of the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, config = "/".join(rest.split("/")[:2]), "/".join(rest.split("/")[2:])
    try:
        found = snapshot_download(name, repo_type="dataset", local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        hint = f"hf download {name} --repo-type dataset"
        raise DataError(f"{data} is not downloaded", hint) from error
    root = Path(found) / config
    configs = sorted({path.parent for path in root.rglob("*.parquet")})
    if any(folder in configs for folder in (root, root / "data", root / "train")):
        return root
    if len(configs) > 1:
        named = ", ".join(str(each.relative_to(root)) for each in configs[:5])
        raise DataError(f"{data} has several configs: {named}", f"name one: hfds/{name}/CONFIG")
    return configs[0] if configs else root


def _of_tfds(data: str, name: str) -> Path:
    """`tfds/NAME[/CONFIG][:VERSION]`, as TensorFlow Datasets has prepared it; no TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        needed = f"{data} needs tensorflow_datasets, which is not installed"
        raise DataError(needed, "pip install 'spiralrope[tfds]'") from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of what is said below
    try:
        builder = tfds.builder(name)
        place = Path(builder.data_path)
    except (tfds.core.DatasetNotFoundError, ValueError, RuntimeError, ImportError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        hint = "$TFDS_DATA_DIR names the folder of data sets, by default ~/tensorflow_datasets"
        raise DataError(f"{data}: {said}", hint) from error
    if not builder.is_prepared():
        raise DataError(
            f"{data} is not prepared: {place} does not exist",
            f"tfds build {name} --file_format=array_record; $TFDS_DATA_DIR names another folder",
        )
    return place


def _inat(data: str) -> Path:
    """INaturalist, where its archives were unpacked: the download has 120 or 82 GB."""
    place, year = cache_folder() / data, INAT[data]
    if not place.is_dir():
        raise DataError(
            f"{data}: {place} does not exist",
            f"put train{year}.json, val{year}.json and train_val{year}/ of iNaturalist there, or "
            "name the folder that has them",
        )
    return place


def _cifar100(root: Path) -> Path:
    """CIFAR-100 of torchvision as a tar file of PNG files for each split, in the cache folder."""
    from filelock import FileLock

    made = cache_folder() / "cifar100"
    made.mkdir(parents=True, exist_ok=True)
    with FileLock(made / ".lock"):  # of several processes one writes them
        if all((made / f"{split}.tar").exists() for split in ("train", "test")):
            return made
        if (root / CIFAR100).is_dir():
            _as_tar(root, made)
        elif (archive := root / f"{CIFAR100}.tar.gz").is_file():
            with tempfile.TemporaryDirectory(dir=made) as unpacked:
                _unpack(archive, Path(unpacked))
                _as_tar(Path(unpacked), made)
        else:
            hint = f"spiralrope fetch cifar100, or put {CIFAR100}.tar.gz into {root}"
            raise DataError("cifar100 is not downloaded", hint)
    return made


def _unpack(archive: Path, folder: Path) -> None:
    (folder / CIFAR100).mkdir()
    try:
        with tarfile.open(archive) as tar:
            for name in ("train", "test", "meta"):
                if found := tar.extractfile(f"{CIFAR100}/{name}"):
                    (folder / CIFAR100 / name).write_bytes(found.read())
    except (tarfile.TarError, EOFError, KeyError, OSError) as error:
        raise DataError(f"{archive} is damaged: {error}", "download it again") from error


def _as_tar(root: Path, target: Path) -> None:
    from PIL import Image
    from torchvision import datasets

    for name, train in (("train", True), ("test", False)):
        try:
            split = datasets.CIFAR100(str(root), train)  # it compares checksums before it unpickles
        except RuntimeError as error:
            raise DataError(
                f"{root / CIFAR100} is not CIFAR-100 as published: other checksums",
                "download it again",
            ) from error
        say(f"reading the images of CIFAR-100 ({name}), once")
        with atomic_write(target / f"{name}.tar") as beside, tarfile.open(beside, "w") as tar:
            for place, (pixels, label) in enumerate(zip(split.data, split.targets, strict=True)):
                Image.fromarray(pixels).save(content := io.BytesIO(), "PNG")
                member = tarfile.TarInfo(f"{split.classes[label]}/{place:05d}.png")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
