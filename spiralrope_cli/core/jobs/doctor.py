"""`doctor`: checks this machine, and what a run needs.

Each `inspect_...` returns values for JSON and rows for the table. An error in one part does not
stop the others. Modules that load torch are imported inside functions.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from spiralrope_cli import __version__
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.samples import default_num_samples
from spiralrope_cli.core.config.training import Checkup
from spiralrope_cli.core.data.splits import find_data_set, find_train_set, train_split, val_split
from spiralrope_cli.core.errors import CheckpointError, DataError, FetchError, SpiralRopeError
from spiralrope_cli.core.hub import download
from spiralrope_cli.core.hub.catalog import ROWS, find_row
from spiralrope_cli.core.resolve import default_data, resolve
from spiralrope_cli.core.runtime.launch import plan_only, usable_cores
from spiralrope_cli.core.runtime.progress import console, human_size
from spiralrope_cli.core.storage import cache_folder, nearest_folder

OF_TRAINING = ("arch", "data", "batch_size", "micro_batch_size", "nproc", "device", "precision")
DECODED = 48
"""Number of images per split that are decoded as a test."""
HUB_SECONDS = 3.0
HUB_ROW = "dit-s2"

Values = dict[str, Any]
Rows = list[tuple[str, str]]
"""Rows of the table: (title, text)."""


class Finding(NamedTuple):
    """A problem, and what to do."""

    subject: str  # part of the check
    problem: str
    hint: str = ""


def check_machine(given: dict[str, Any]) -> bool:
    """Runs all checks and prints them; returns whether there is no problem."""
    options = {name: given[name] for name in OF_TRAINING if name in given}
    checkup: Checkup = build(Checkup, {**given, "options": options})
    values, rows, findings = work(checkup)
    if checkup.as_json:
        print(json.dumps(values, indent=2))  # noqa: T201 - rich would wrap it
    else:
        report(rows, values["notes"], findings)
    return not findings


# ---- work
def work(checkup: Checkup) -> tuple[Values, Rows, list[Finding]]:
    """Checks one part after the other; an error becomes a finding."""
    from spiralrope_cli.core.training.advice import memory_notes

    values: Values = {}
    rows: Rows = []
    findings: list[Finding] = []
    parts = {
        "versions": lambda: inspect_versions(findings),
        "machine": lambda: inspect_device(checkup),
        "data": lambda: inspect_data(checkup, findings),
        "run": lambda: inspect_run(checkup),
        "disk": lambda: inspect_disk(checkup, values, findings),
        "hub": lambda: inspect_hub(checkup),
        "cache": lambda: inspect_cache(findings),
    }
    with console(stderr=True).status("") as status:
        for name, inspect in parts.items():
            status.update(f"checking: {name}")
            values[name], of_part = None, [(name, "see below")]
            # Without machine or data a run cannot be planned; do not report the same error twice.
            if name != "run" or None not in (values["machine"], values["data"]):
                try:
                    values[name], of_part = inspect()
                except SpiralRopeError as error:
                    findings.append(Finding(name, error.message, error.hint))
            rows += of_part
    values["notes"] = memory_notes(values["machine"], values["run"])
    values["findings"] = [finding._asdict() for finding in findings]
    values["ok"] = not findings
    return values, rows, findings


def inspect_versions(findings: list[Finding]) -> tuple[Values, Rows]:
    """Installed versions of required packages, and of installed optional ones."""
    from spiralrope_cli.core.runtime import device

    values: Values = {
        "spiralrope": {"installed": __version__, "needed": ""},
        "python": {"installed": device.versions()["python"], "needed": ""},
    }
    for wanted, installed, optional in device.dependencies():
        fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
        if not fits and not optional:
            there = f"is {installed}" if installed else "is not installed"
            problem = f"{wanted.name} {there}; {wanted.specifier} is needed"
            hint = f'pip install "{wanted.name}{wanted.specifier}"'
            findings.append(Finding("versions", problem, hint))
        values[wanted.name] = {"installed": installed, "needed": str(wanted.specifier)}
    here = (f"{name} {each['installed'] or 'missing'}" for name, each in values.items())
    return values, [("versions", ", ".join(here))]


def inspect_device(checkup: Checkup) -> tuple[Values, Rows]:
    """Devices, precision, cores and speed of matmuls."""
    import torch

    from spiralrope_cli.core.runtime import device as devices

    device = devices.pick_device(checkup.machine)
    precision, reason = devices.pick_precision(checkup.machine.precision, device)
    devices.prepare_device(device, precision)
    gpus: list[Values] = [
        {"name": gpu.name, "memory": int(gpu.total_memory)}
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    rates = {
        str(kind).removeprefix("torch."): devices.matrix_rate(device, kind)
        for kind in dict.fromkeys((torch.float32, devices.DTYPES[precision]))
    }
    values: Values = {
        "device": device.type,
        "name": devices.device_name(device),
        "gpus": gpus,
        "precision": devices.PRECISION_WORDS[precision],
        "precision_reason": reason,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flops_per_second": rates,
        "commit": devices.commit(),
    }
    gpu_words = "; ".join(f"{gpu['name']}, {human_size(gpu['memory'])}" for gpu in gpus)
    rate_words = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    cores = f"{values['cores']}, {values['threads']} thread(s)"
    return values, [
        ("device", f"{values['device']}: {values['name']}"),
        ("GPUs", gpu_words or "none"),
        ("precision", f"{values['precision']}: {values['precision_reason']}"),
        ("cores", f"{cores}; {human_size(values['memory'])} memory"),
        ("matmul", f"{rate_words} GFLOP/s"),
    ]


def inspect_data(checkup: Checkup, findings: list[Finding]) -> tuple[Values, Rows]:
    """Classes, counts, and whether some of the images can be decoded."""
    from spiralrope_cli.core.data import memory
    from spiralrope_cli.core.data.images import decode_some

    given = "data" in checkup.options
    source, named = ("option", checkup.options) if given else default_data()
    data = named["data"]
    plan_only.set(True)  # a stream that was never read is not read now
    data_set = find_train_set(data) if checkup.dit else find_data_set(data)
    values: Values = {
        "data": data_set.data,
        "chosen_by": source,
        "classes": data_set.num_classes,
        "train": data_set.num_train,
        "val": data_set.num_val,
        "decoded": 0,
        "unreadable": [],
    }
    if data_set.kind == "folder":
        readers = [train_split] if checkup.dit else [train_split, val_split]
        count, bad = decode_some((read(data_set.data) for read in readers), DECODED)
        values |= {
            "decoded": count - len(bad),
            "unreadable": [{"path": each.path, "reason": each.reason} for each in bad],
        }
        if bad:
            error = bad[0].error()
            more = f" ({len(bad)} of {count} tested images)" if len(bad) > 1 else ""
            findings.append(Finding("data", error.message + more, error.hint))
    elif memory.is_here(data):
        splits = memory.load_memory_set(data)
        counts = [len(split.labels) for split in splits]
        if counts != [data_set.num_train, data_set.num_val]:
            raise DataError(f"{data} has {counts} images, which is a wrong number")
        values["decoded"] = sum(counts)
    else:
        values["note"] = "not downloaded: the first run downloads it"
    chosen = "" if source == "default" else f" (by {source})"
    val = f" and {data_set.num_val} validation" if data_set.num_val else ""
    tried = values["decoded"] + len(values["unreadable"])
    seen = values.get("note") or f"{values['decoded']} of {tried} tested images can be decoded"
    images = f"{data_set.num_classes} classes, {data_set.num_train} training{val} images"
    notes = [("  note", note) for note in data_set.notes]
    return values, [("data", f"{data_set.data}{chosen}: {images}; {seen}"), *notes]


def inspect_run(checkup: Checkup) -> tuple[Values, Rows]:
    """Needs of the training run, and valid values of its options."""
    from spiralrope_cli.core.training.advice import advice

    command = "dit-train" if checkup.dit else "pretrain"
    values = advice(resolve(command, {"nproc": 1, **checkup.options}).run, checkup.machine)
    needs, nproc, rotates = values["memory"], values["nproc"], values["valid_rotate"]
    whole = len(rotates) > 2 and rotates == list(range(len(rotates)))
    rotate = f"0 to {rotates[-1]}" if whole else _few(rotates)
    parameters, flops = values["parameters"] / 1e6, values["flops_per_image"] / 1e9
    size = f"{parameters:.2f} M parameters, {flops:.3g} GFLOPs per image"
    fixed, per_image = human_size(needs["fixed"]), human_size(needs["per_image"])
    split = f"{nproc} process(es) x {values['micro_batch_size']} x {values['accumulation']}"
    return values, [
        ("model", f"{values['arch']}: {size}"),
        ("batch", f"{values['batch_size']} = {split}"),
        ("  --nproc", f"valid: {_few(values['valid_nproc'])}"),
        ("  --batch-size", f"valid with {nproc} process(es): {_few(values['valid_batch_sizes'])}"),
        (
            "  --rotate",
            f"valid: {rotate}; with --same-theta {_few(values['valid_rotate_same_theta'])}",
        ),
        (
            "memory",
            f"about {human_size(needs['total'])} per process: {fixed} for weights and optimizer, "
            f"{per_image} per image",
        ),
    ]


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def inspect_disk(checkup: Checkup, found: Values, findings: list[Finding]) -> tuple[Values, Rows]:
    """Whether the runs folder is writable, and has enough space for a run."""
    folder = Path(os.path.expanduser(checkup.runs)).absolute()
    there = nearest_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        raise CheckpointError(
            f"--runs {checkup.runs}: {there} cannot be written: {error.strerror}",
            "change its permissions, or use another folder with --runs and --out",
        ) from error
    free = shutil.disk_usage(there).free
    planned = found["run"] or {}
    needs = {"checkpoints": planned.get("checkpoint_bytes", 0) * planned.get("checkpoints", 0)}
    if checkup.dit and planned:
        height, width = planned["image_size"]
        num = checkup.num_samples or default_num_samples(found["data"]["data"])
        needs["samples"] = 3 * num * height * width
    if sum(needs.values()) > free:
        words = " and ".join(f"{human_size(size)} of {name}" for name, size in needs.items())
        problem = f"{there} has {human_size(free)} free, but a run needs {words}"
        hint = "free some, or use --runs and --out with a folder on another disk"
        findings.append(Finding("disk", problem, hint))
    needed = ", ".join(f"{human_size(size)} {name}" for name, size in needs.items() if size)
    more = f"; a run needs {needed}" if needed else ""
    values: Values = {"folder": str(folder), "free": free, "needs": needs}
    return values, [("disk", f"{folder}: {human_size(free)} free{more}")]


def inspect_hub(checkup: Checkup) -> tuple[Values, Rows]:
    """Whether the Hub answers; not checked offline."""
    from huggingface_hub import constants

    values: Values = {"endpoint": constants.ENDPOINT, "asked": False, "answers": False, "words": ""}
    if checkup.offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if checkup.offline else "HF_HUB_OFFLINE"
        values |= {"words": f"not checked: {why}"}
    else:
        try:
            download.look_up(find_row(HUB_ROW), timeout=HUB_SECONDS)
            values |= {"asked": True, "answers": True, "words": "answers"}
        except FetchError as error:
            values |= {"asked": True, "words": error.message, "hint": error.hint}
    return values, [("Hub", f"{values['endpoint']}: {values['words']}")]


def inspect_cache(findings: list[Finding]) -> tuple[Values, Rows]:
    """Cached published files, compared with their digests."""
    from huggingface_hub import constants

    values: Values = {"hub": constants.HF_HUB_CACHE, "own": str(cache_folder()), "files": []}
    words = []
    for row in ROWS:
        if files := download.local_files(row):
            bad = download.damaged_files(row)
            size = sum(path.stat().st_size for path in files)
            values["files"].append({"name": row.name, "size": size, "whole": not bad})
            words.append(f"{row.name} {human_size(size)}" + (" (damaged)" if bad else ""))
            for path in bad:
                problem = f"{path} is damaged: its digest is wrong"
                findings.append(
                    Finding("cache", problem, f"spiralrope fetch {row.name} downloads it again")
                )
    there = ", ".join(words) or "no published files"
    return values, [("cache", there), ("", values["hub"]), ("", values["own"])]


# ---- report
def report(rows: Rows, notes: list[str], findings: list[Finding]) -> None:
    """Prints a table for 80 columns on stdout; findings last."""
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
    out.print(f"{len(findings)} problem(s) found" if findings else "no problems found")
