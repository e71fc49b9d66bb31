"""What `doctor` shows: a table that fits 80 columns, or JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from spiralrope_cli.core.runtime.console import console
from spiralrope_cli.core.runtime.disk import human_size

Facts = dict[str, Any]


def show(facts: Facts, *, as_json: bool) -> None:
    """Everything on stdout, findings last."""
    if as_json:
        print(json.dumps(facts, indent=2))  # noqa: T201 - rich would wrap it
        return
    out = console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    words = {
        "versions": version_lines,
        "machine": machine_lines,
        "data": data_lines,
        "run": run_lines,
        "disk": disk_lines,
        "hub": hub_lines,
        "cache": cache_lines,
    }
    for name, lines in words.items():
        for title, text in lines(facts[name]) if facts[name] else [(name, "see below")]:
            table.add_row(title, text)
    out.print(table)
    for note in facts["notes"]:
        out.print(f"note: {note}")
    for finding in facts["findings"]:
        out.print(f"problem ({finding['subject']}): {finding['problem']}")
        if finding["hint"]:
            out.print(f"  {finding['hint']}")
    count = len(facts["findings"])
    out.print(f"{count} problem(s) found" if count else "all is well")


def version_lines(facts: Facts) -> list[tuple[str, str]]:
    """Names with versions."""
    here = (f"{name} {each['installed'] or 'missing'}" for name, each in facts.items())
    return [("versions", ", ".join(here))]


def machine_lines(facts: Facts) -> list[tuple[str, str]]:
    """Device, precision, cores and rate."""
    gpus = "; ".join(f"{gpu['name']}, {human_size(gpu['memory'])}" for gpu in facts["gpus"])
    rates = (f"{name} {rate / 1e9:,.0f}" for name, rate in facts["flops_per_second"].items())
    return [
        ("device", f"{facts['device']}: {facts['name']}"),
        ("GPUs", gpus or "none"),
        ("precision", f"{facts['precision']}: {facts['precision_reason']}"),
        (
            "cores",
            f"{facts['cores']}, {facts['threads']} thread(s); {human_size(facts['memory'])} memory",
        ),
        ("products", f"{', '.join(rates)} GFLOP/s"),
    ]


def data_lines(facts: Facts) -> list[tuple[str, str]]:
    """Data set and its pictures."""
    chosen = "" if facts["chosen_by"] == "default" else f" (by {facts['chosen_by']})"
    held_out = f" and {facts['val']} held-out" if facts["val"] else ""
    looked = len(facts["unreadable"]) + facts["decoded"]
    seen = facts.get("note") or f"{facts['decoded']} of {looked} looked at could be decoded"
    return [
        (
            "data",
            f"{facts['data']}{chosen}: {facts['classes']} classes, {facts['train']} training"
            f"{held_out} images; {seen}",
        )
    ]


def run_lines(facts: Facts) -> list[tuple[str, str]]:
    """What a run needs and could have."""
    memory = facts["memory"]
    return [
        (
            "model",
            f"{facts['arch']}: {facts['parameters'] / 1e6:.2f} M parameters, "
            f"{facts['flops_per_image'] / 1e9:.3g} GFLOPs per image",
        ),
        (
            "batch",
            f"{facts['batch_size']} = {facts['nproc']} process(es) x {facts['micro_batch_size']} "
            f"x {facts['accumulation']}",
        ),
        ("  --nproc", f"{_few(facts['valid_nproc'])} split it"),
        (
            "  --batch-size",
            f"{_few(facts['valid_batch_sizes'])} split over {facts['nproc']} process(es)",
        ),
        (
            "  --rotate",
            f"{_range(facts['valid_rotate'])}; with --same-theta "
            f"{_few(facts['valid_rotate_same_theta'])}",
        ),
        (
            "memory",
            f"about {human_size(memory['total'])} per process: {human_size(memory['fixed'])} for "
            f"weights and optimizer, {human_size(memory['per_image'])} per image",
        ),
    ]


def disk_lines(facts: Facts) -> list[tuple[str, str]]:
    """Room for runs."""
    needs = ", ".join(f"{human_size(size)} {name}" for name, size in facts["needs"].items() if size)
    wanted = f"; a run takes {needs}" if needs else ""
    return [("disk", f"{facts['folder']}: {human_size(facts['free'])} free{wanted}")]


def hub_lines(facts: Facts) -> list[tuple[str, str]]:
    """The Hub's answer."""
    return [("Hub", f"{facts['endpoint']}: {facts['words']}")]


def cache_lines(facts: Facts) -> list[tuple[str, str]]:
    """Published files that are here."""
    files = [
        f"{each['name']} {human_size(each['size'])}" + ("" if each["whole"] else " (damaged)")
        for each in facts["files"]
    ]
    return [
        ("cache", ", ".join(files) or "nothing published is here"),
        ("", f"{facts['hub']}"),
        ("", f"{facts['own']}"),
    ]


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _range(numbers: list[int]) -> str:
    whole = numbers == list(range(len(numbers)))
    return f"0 to {numbers[-1]}" if whole and len(numbers) > 2 else _few(numbers)
