"""A look at this machine: each part is looked at whatever another one found."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from spiralrope_cli.core.config.datasets import (
    DataSet,
    class_folders,
    find_data_set,
    find_pictures,
    list_images,
    val_folder,
)
from spiralrope_cli.core.config.doctor import Checkup, Finding
from spiralrope_cli.core.config.folders import cache_folder
from spiralrope_cli.core.config.resolve import choose_data
from spiralrope_cli.core.config.samples import num_samples
from spiralrope_cli.core.data import memory
from spiralrope_cli.core.data.pictures import Unreadable, open_picture
from spiralrope_cli.core.errors import CheckpointError, DataError, FetchError, SpiralRopeError
from spiralrope_cli.core.hub import from_hub
from spiralrope_cli.core.hub.catalog import ROWS, find
from spiralrope_cli.core.hub.download import damaged_files, local_files
from spiralrope_cli.core.jobs import doctor_report
from spiralrope_cli.core.jobs.doctor_advice import advice, npz_bytes
from spiralrope_cli.core.runtime import environment
from spiralrope_cli.core.runtime.console import console
from spiralrope_cli.core.runtime.device import pick_device, pick_precision, prepare
from spiralrope_cli.core.runtime.disk import human_size, nearest_folder
from spiralrope_cli.core.runtime.rate import matrix_rate
from spiralrope_cli.core.runtime.threads import usable_cores
from spiralrope_cli.version import __version__

PACKAGE = "spiralrope"
SAMPLE = 48
"""Pictures of each split that are decoded."""
HUB_SECONDS = 3.0
HUB_ROW = "dit-s2"
Facts = dict[str, Any]


def run(checkup: Checkup) -> bool:
    """Looks at everything and shows it.

    Returns:
        whether nothing was found that would make a run fail.
    """
    findings: list[Finding] = []
    facts: Facts = {}
    parts = {
        "versions": lambda: look_at_versions(findings),
        "machine": lambda: look_at_machine(checkup),
        "data": lambda: look_at_data(checkup, findings),
        "run": lambda: advice(checkup),
        "disk": lambda: look_at_disk(checkup, facts.get("run") or {}, findings),
        "hub": lambda: look_at_hub(checkup),
        "cache": lambda: look_at_cache(findings),
    }
    with console(stderr=True).status("") as status:
        for name, look in parts.items():
            status.update(f"looking at: {name}")
            facts[name] = None
            # What keeps a run from being planned is told once.
            if name == "run" and None in (facts["machine"], facts["data"]):
                continue
            with told(name, findings):
                facts[name] = look()
    facts["notes"] = memory_notes(facts["machine"], facts["run"])
    facts["findings"] = [vars(each) for each in findings]
    facts["ok"] = not findings
    doctor_report.show(facts, as_json=checkup.as_json)
    return not findings


@contextlib.contextmanager
def told(subject: str, findings: list[Finding]) -> Iterator[None]:
    """Makes a finding of an error."""
    try:
        yield
    except SpiralRopeError as error:
        findings.append(Finding(subject, error.message, error.hint))


def look_at_versions(findings: list[Finding]) -> Facts:
    """Installed versions of what is required, and of what is optional and there."""
    facts: Facts = {
        "spiralrope": {"installed": __version__, "needed": ""},
        "python": {"installed": environment.versions()["python"], "needed": ""},
    }
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        lines = []  # run from a checkout that was never installed
    for line in lines:
        wanted = Requirement(line)
        optional = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if wanted.marker is not None and wanted.marker.evaluate({"extra": "dev"}) and optional:
            continue
        installed = environment.version_of(wanted.name)
        if installed is None and optional:
            continue
        fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
        if not fits and not optional:
            there = f"is {installed}" if installed else "is not installed"
            findings.append(
                Finding(
                    "versions",
                    f"{wanted.name} {there}; {wanted.specifier} is needed",
                    f'pip install "{wanted.name}{wanted.specifier}"',
                )
            )
        facts[wanted.name] = {"installed": installed, "needed": str(wanted.specifier)}
    return facts


def look_at_machine(checkup: Checkup) -> Facts:
    """Devices, precision, cores and how fast matrices are multiplied.

    Raises:
        ConfigError: the device that was asked for is not here.
    """
    device = pick_device(checkup.machine)
    prepare(device)
    dtype, reason = pick_precision(checkup.machine.precision, device)
    gpus = [
        {"name": torch.cuda.get_device_name(n), "memory": _gpu_memory(n)}
        for n in range(torch.cuda.device_count())
    ]
    rates = {_name(kind): matrix_rate(device, kind) for kind in {torch.float32: 0, dtype: 0}}
    return {
        "device": device.type,
        "name": environment.device_name(device),
        "gpus": gpus,
        "precision": _name(dtype),
        "precision_reason": reason,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flops_per_second": rates,
        "commit": environment.commit(),
    }


def _gpu_memory(number: int) -> int:
    return int(torch.cuda.get_device_properties(number).total_memory)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def look_at_data(checkup: Checkup, findings: list[Finding]) -> Facts:
    """Classes, counts, and whether a sample of the pictures can be decoded.

    Raises:
        DataError: no such data set, an empty class, or splits that differ.
    """
    data, source = choose_data([("option", checkup.options)])
    data_set = find_pictures(data) if checkup.dit else find_data_set(data)
    facts = {
        "data": data_set.data,
        "chosen_by": source,
        "classes": data_set.num_classes,
        "train": data_set.num_train,
        "val": data_set.num_val,
        "decoded": 0,
        "unreadable": [],
    }
    if data_set.kind == "folder":
        paths = sampled(data_set, dit=checkup.dit)
        opened = [open_picture(path, lambda image: image.convert("RGB")) for path in paths]
        bad = [each for each in opened if isinstance(each, Unreadable)]
        facts |= {"decoded": len(paths) - len(bad), "unreadable": [vars(each) for each in bad]}
        if bad:
            error = bad[0].error()
            more = f" ({len(bad)} of {len(paths)} looked at)" if len(bad) > 1 else ""
            findings.append(Finding("data", error.message + more, error.hint))
    elif memory.is_here(data):
        splits = memory.load_memory_set(data)
        counts = [len(split.labels) for split in splits]
        if counts != [data_set.num_train, data_set.num_val]:
            raise DataError(f"{data} holds {counts} images in place of its own number")
        facts["decoded"] = sum(counts)
    else:
        facts["note"] = "not here yet: the first run brings it"
    return facts


def sampled(data_set: DataSet, *, dit: bool) -> list[str]:
    """Paths of pictures, evenly spread over each split."""
    root = Path(data_set.data)
    folders = [class_folders(root)] if dit else [root / "train", val_folder(root)]
    found: list[str] = []
    for folder in folders:
        paths = [path for path, _ in list_images(folder)] if folder else []
        count = min(SAMPLE, len(paths))
        found += [paths[number * len(paths) // count] for number in range(count)]
    return found


def look_at_disk(checkup: Checkup, planned: Facts, findings: list[Finding]) -> Facts:
    """Whether the runs folder can be written, and holds what a run leaves there.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = Path(checkup.runs).expanduser().absolute()
    there = nearest_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        raise CheckpointError(
            f"--runs {checkup.runs}: {there} cannot be written: {error.strerror}",
            "make it yours, or name another folder with --runs and --out",
        ) from error
    free = shutil.disk_usage(there).free
    needs = {"checkpoints": planned.get("checkpoint_bytes", 0) * planned.get("checkpoints", 0)}
    if checkup.dit and planned:
        data, _ = choose_data([("option", checkup.options)])
        num = checkup.num or num_samples(data)
        needs["samples"] = npz_bytes(num, planned["picture_size"])
    if sum(needs.values()) > free:
        words = " and ".join(f"{human_size(size)} of {name}" for name, size in needs.items())
        findings.append(
            Finding(
                "disk",
                f"{there} has {human_size(free)} free; a run leaves {words}",
                "free some, or name a folder on another disk with --runs and --out",
            )
        )
    return {"folder": str(folder), "free": free, "needs": needs}


def memory_notes(machine: Facts | None, planned: Facts | None) -> list[str]:
    """Whether a run is likely to need more memory than there is; an estimate, so no finding."""
    if not machine or not planned:
        return []
    needs, sharing = planned["memory"], planned["nproc"]
    there = machine["memory"] / sharing
    if machine["device"] == "cuda":
        there = min(gpu["memory"] for gpu in machine["gpus"])
    if needs["total"] <= there:
        return []
    most = int((there - needs["fixed"]) // needs["per_image"])
    advised = (
        f"--micro-batch-size {most} or less, or --grad-checkpointing"
        if most > 0
        else "a smaller --arch"
    )
    return [
        f"about {human_size(needs['total'])} per process may be needed, {human_size(there)} are "
        f"there: {advised}"
    ]


def look_at_hub(checkup: Checkup) -> Facts:
    """Whether the Hub answers; nobody is asked offline."""
    from huggingface_hub import constants

    facts: Facts = {"endpoint": constants.ENDPOINT, "asked": False, "answers": False, "words": ""}
    if checkup.offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if checkup.offline else "HF_HUB_OFFLINE"
        return {**facts, "words": f"not asked: {why}"}
    try:
        from_hub.look_up(find(HUB_ROW), None, timeout=HUB_SECONDS)
    except FetchError as error:
        return {**facts, "asked": True, "words": error.message, "hint": error.hint}
    return {**facts, "asked": True, "answers": True, "words": "answers"}


def look_at_cache(findings: list[Finding]) -> Facts:
    """Published files that are here, each compared with its digest."""
    from huggingface_hub import constants

    rows = []
    for row in ROWS:
        if files := local_files(row):
            bad = damaged_files(row)
            size = sum(path.stat().st_size for path in files)
            rows.append({"name": row.name, "size": size, "whole": not bad})
            findings += [
                Finding(
                    "cache",
                    f"{path} is damaged: its bytes have another digest than its name says",
                    f"spiralrope fetch {row.name} brings it again",
                )
                for path in bad
            ]
    return {"hub": constants.HF_HUB_CACHE, "own": str(cache_folder()), "files": rows}
