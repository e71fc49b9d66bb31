"""A look at this machine: each part is looked at whatever another one found.

Every `look_at_...` gives what it found twice: as values for JSON, and as rows of the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from spiralrope_cli import __version__
from spiralrope_cli.core.config.datasets import (
    class_folders,
    find_data_set,
    find_train_set,
    val_folder,
)
from spiralrope_cli.core.config.doctor import Checkup, Finding
from spiralrope_cli.core.config.hub import cache_folder
from spiralrope_cli.core.config.resolve import choose_data
from spiralrope_cli.core.config.samples import default_num_samples
from spiralrope_cli.core.data import memory
from spiralrope_cli.core.data.images import decode_some
from spiralrope_cli.core.errors import CheckpointError, DataError, FetchError, SpiralRopeError
from spiralrope_cli.core.hub import download
from spiralrope_cli.core.hub.catalog import ROWS, find
from spiralrope_cli.core.runtime import device as devices
from spiralrope_cli.core.runtime.device import matrix_rate, pick_device, pick_precision
from spiralrope_cli.core.runtime.launch import usable_cores
from spiralrope_cli.core.runtime.progress import console, human_size
from spiralrope_cli.core.runtime.run_folder import nearest_folder
from spiralrope_cli.core.training.needs import advice, memory_notes

SAMPLE = 48
"""Pictures of each split that are decoded."""
HUB_SECONDS = 3.0
HUB_ROW = "dit-s2"
Facts = dict[str, Any]
Rows = list[tuple[str, str]]
"""Of the table: a title and a text."""


def run(checkup: Checkup) -> bool:
    """Looks at everything and shows it.

    Returns:
        whether nothing was found that would make a run fail.
    """
    findings: list[Finding] = []
    facts: Facts = {}
    rows: Rows = []
    parts = {
        "versions": lambda: look_at_versions(findings),
        "machine": lambda: look_at_machine(checkup),
        "data": lambda: look_at_data(checkup, findings),
        "run": lambda: look_at_run(checkup),
        "disk": lambda: look_at_disk(checkup, facts.get("run") or {}, findings),
        "hub": lambda: look_at_hub(checkup),
        "cache": lambda: look_at_cache(findings),
    }
    with console(stderr=True).status("") as status:
        for name, look in parts.items():
            status.update(f"looking at: {name}")
            facts[name], of_part = None, [(name, "see below")]
            # What keeps a run from being planned is told once.
            if name != "run" or None not in (facts["machine"], facts["data"]):
                with told(name, findings):
                    facts[name], of_part = look()
            rows += of_part
    facts["notes"] = memory_notes(facts["machine"], facts["run"])
    facts["findings"] = [vars(each) for each in findings]
    facts["ok"] = not findings
    if checkup.as_json:
        print(json.dumps(facts, indent=2))  # noqa: T201 - rich would wrap it
    else:
        report(rows, facts["notes"], findings)
    return not findings


def report(rows: Rows, notes: list[str], findings: list[Finding]) -> None:
    """Everything on stdout, in a table that fits 80 columns; findings last."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in rows:
        table.add_row(title, text)
    out = console()
    out.print(table)
    for note in notes:
        out.print(f"note: {note}")
    for finding in findings:
        out.print(f"problem ({finding.subject}): {finding.problem}")
        if finding.hint:
            out.print(f"  {finding.hint}")
    out.print(f"{len(findings)} problem(s) found" if findings else "all is well")


@contextlib.contextmanager
def told(subject: str, findings: list[Finding]) -> Iterator[None]:
    """Makes a finding of an error."""
    try:
        yield
    except SpiralRopeError as error:
        findings.append(Finding(subject, error.message, error.hint))


def look_at_versions(findings: list[Finding]) -> tuple[Facts, Rows]:
    """Installed versions of what is required, and of what is optional and there."""
    facts: Facts = {
        "spiralrope": {"installed": __version__, "needed": ""},
        "python": {"installed": devices.versions()["python"], "needed": ""},
    }
    for wanted, installed, optional in devices.dependencies():
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
    here = (f"{name} {each['installed'] or 'missing'}" for name, each in facts.items())
    return facts, [("versions", ", ".join(here))]


def look_at_machine(checkup: Checkup) -> tuple[Facts, Rows]:
    """Devices, precision, cores and how fast matrices are multiplied.

    Raises:
        ConfigError: the device that was asked for is not here.
    """
    device = pick_device(checkup.machine)
    devices.prepare_device(device)
    dtype, reason = pick_precision(checkup.machine.precision, device)
    gpus: list[Facts] = [
        {"name": gpu.name, "memory": int(gpu.total_memory)}
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    rates = {_name(kind): matrix_rate(device, kind) for kind in {torch.float32: 0, dtype: 0}}
    facts: Facts = {
        "device": device.type,
        "name": devices.device_name(device),
        "gpus": gpus,
        "precision": _name(dtype),
        "precision_reason": reason,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flops_per_second": rates,
        "commit": devices.commit(),
    }
    gpu_words = "; ".join(f"{gpu['name']}, {human_size(gpu['memory'])}" for gpu in gpus)
    rate_words = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    cores = f"{facts['cores']}, {facts['threads']} thread(s)"
    return facts, [
        ("device", f"{facts['device']}: {facts['name']}"),
        ("GPUs", gpu_words or "none"),
        ("precision", f"{facts['precision']}: {facts['precision_reason']}"),
        ("cores", f"{cores}; {human_size(facts['memory'])} memory"),
        ("products", f"{rate_words} GFLOP/s"),
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def look_at_data(checkup: Checkup, findings: list[Finding]) -> tuple[Facts, Rows]:
    """Classes, counts, and whether a sample of the pictures can be decoded.

    Raises:
        DataError: no such data set, an empty class, or splits that differ.
    """
    data, source = choose_data([("option", checkup.options)])
    data_set = find_train_set(data) if checkup.dit else find_data_set(data)
    facts: Facts = {
        "data": data_set.data,
        "chosen_by": source,
        "classes": data_set.num_classes,
        "train": data_set.num_train,
        "val": data_set.num_val,
        "decoded": 0,
        "unreadable": [],
    }
    if data_set.kind == "folder":
        root = Path(data_set.data)
        folders = [class_folders(root)] if checkup.dit else [root / "train", val_folder(root)]
        count, bad = decode_some(folders, SAMPLE)
        facts |= {"decoded": count - len(bad), "unreadable": [vars(each) for each in bad]}
        if bad:
            error = bad[0].error()
            more = f" ({len(bad)} of {count} looked at)" if len(bad) > 1 else ""
            findings.append(Finding("data", error.message + more, error.hint))
    elif memory.is_here(data):
        splits = memory.load_memory_set(data)
        counts = [len(split.labels) for split in splits]
        if counts != [data_set.num_train, data_set.num_val]:
            raise DataError(f"{data} holds {counts} images in place of its own number")
        facts["decoded"] = sum(counts)
    else:
        facts["note"] = "not here yet: the first run brings it"
    chosen = "" if source == "default" else f" (by {source})"
    held_out = f" and {data_set.num_val} held-out" if data_set.num_val else ""
    looked = facts["decoded"] + len(facts["unreadable"])
    seen = facts.get("note") or f"{facts['decoded']} of {looked} looked at could be decoded"
    return facts, [
        (
            "data",
            f"{data_set.data}{chosen}: {data_set.num_classes} classes, {data_set.num_train} "
            f"training{held_out} images; {seen}",
        )
    ]


def look_at_run(checkup: Checkup) -> tuple[Facts, Rows]:
    """What a training run would need here, and which values it could have.

    Raises:
        ConfigError: no such run exists.
        DataError: no such data set.
    """
    facts = advice(checkup)
    needs, nproc, rotates = facts["memory"], facts["nproc"], facts["valid_rotate"]
    whole = len(rotates) > 2 and rotates == list(range(len(rotates)))
    rotate_words = f"0 to {rotates[-1]}" if whole else _few(rotates)
    return facts, [
        (
            "model",
            f"{facts['arch']}: {facts['parameters'] / 1e6:.2f} M parameters, "
            f"{facts['flops_per_image'] / 1e9:.3g} GFLOPs per image",
        ),
        (
            "batch",
            f"{facts['batch_size']} = {nproc} process(es) x {facts['micro_batch_size']} "
            f"x {facts['accumulation']}",
        ),
        ("  --nproc", f"{_few(facts['valid_nproc'])} split it"),
        (
            "  --batch-size",
            f"{_few(facts['valid_batch_sizes'])} split over {nproc} process(es)",
        ),
        (
            "  --rotate",
            f"{rotate_words}; with --same-theta {_few(facts['valid_rotate_same_theta'])}",
        ),
        (
            "memory",
            f"about {human_size(needs['total'])} per process: {human_size(needs['fixed'])} for "
            f"weights and optimizer, {human_size(needs['per_image'])} per image",
        ),
    ]


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def look_at_disk(checkup: Checkup, planned: Facts, findings: list[Finding]) -> tuple[Facts, Rows]:
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
        num = checkup.num_samples or default_num_samples(data)
        height, width = planned["picture_size"]
        needs["samples"] = 3 * num * height * width
    if sum(needs.values()) > free:
        words = " and ".join(f"{human_size(size)} of {name}" for name, size in needs.items())
        findings.append(
            Finding(
                "disk",
                f"{there} has {human_size(free)} free; a run leaves {words}",
                "free some, or name a folder on another disk with --runs and --out",
            )
        )
    facts: Facts = {"folder": str(folder), "free": free, "needs": needs}
    needed = ", ".join(f"{human_size(size)} {name}" for name, size in needs.items() if size)
    more = f"; a run takes {needed}" if needed else ""
    return facts, [("disk", f"{folder}: {human_size(free)} free{more}")]


def look_at_hub(checkup: Checkup) -> tuple[Facts, Rows]:
    """Whether the Hub answers; nobody is asked offline."""
    from huggingface_hub import constants

    facts: Facts = {"endpoint": constants.ENDPOINT, "asked": False, "answers": False, "words": ""}
    if checkup.offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if checkup.offline else "HF_HUB_OFFLINE"
        facts |= {"words": f"not asked: {why}"}
    else:
        try:
            download.look_up(find(HUB_ROW), None, timeout=HUB_SECONDS)
            facts |= {"asked": True, "answers": True, "words": "answers"}
        except FetchError as error:
            facts |= {"asked": True, "words": error.message, "hint": error.hint}
    return facts, [("Hub", f"{facts['endpoint']}: {facts['words']}")]


def look_at_cache(findings: list[Finding]) -> tuple[Facts, Rows]:
    """Published files that are here, each compared with its digest."""
    from huggingface_hub import constants

    facts: Facts = {"hub": constants.HF_HUB_CACHE, "own": str(cache_folder()), "files": []}
    words = []
    for row in ROWS:
        if files := download.local_files(row):
            bad = download.damaged_files(row)
            size = sum(path.stat().st_size for path in files)
            facts["files"].append({"name": row.name, "size": size, "whole": not bad})
            words.append(f"{row.name} {human_size(size)}" + (" (damaged)" if bad else ""))
            findings += [
                Finding(
                    "cache",
                    f"{path} is damaged: its bytes have another digest than its name says",
                    f"spiralrope fetch {row.name} brings it again",
                )
                for path in bad
            ]
    there = ", ".join(words) or "nothing published is here"
    return facts, [("cache", there), ("", facts["hub"]), ("", facts["own"])]
