"""`report.html`: one page of what a run was, what came out, and how to do it again.

A folder that holds the folders of several stages gets one page with a part for each of them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.resolve import RUN_KINDS, build, read_config
from spiralrope_cli.core.config.samples import DEFAULTS
from spiralrope_cli.core.data.sample_files import FACTS_FILE, GRID_FILE, NPZ_FILE, read_facts
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.hub.files import say
from spiralrope_cli.core.jobs import report_page as html
from spiralrope_cli.core.jobs.eval_report import EVAL_FILE, SIZES_FILE, Record, read_rows
from spiralrope_cli.core.jobs.plan import data_line, rope_line
from spiralrope_cli.core.jobs.plot import curves
from spiralrope_cli.core.jobs.score_report import LABELS
from spiralrope_cli.core.runtime import environment
from spiralrope_cli.core.runtime.report import (
    ACCURACY_COLUMNS,
    METRICS_FILE,
    accuracy_rows,
    read_metrics,
)
from spiralrope_cli.core.runtime.run_folder import (
    CONFIG_FILE,
    CURVES_FILE,
    ENVIRONMENT_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SOURCES_FILE,
)
from spiralrope_cli.version import __version__

FID_FILE = "fid.json"
STAGES = ("pretrain", "finetune", "dit-train", "dit-sample")
"""Folders of a pipeline in their order; others come after them, by name."""
ANOTHER = "again"
"""Added to the folder of a repeated run, which would find itself finished in its own."""


def leave_report(folder: Path) -> None:
    """Writes the report of a finished run; what goes wrong with it is one line and no failure."""
    try:
        write_report(folder)
    except Exception as error:  # noqa: BLE001 - the run is done, whatever its report meets
        reason = str(error).partition("\n")[0] or type(error).__name__
        say(f"warning: {folder / REPORT_FILE} was not written: {reason}")


def write_report(folder: Path) -> Path:
    """Makes the page of a run folder, or of a folder of stages, from the files in it.

    Args:
        folder: with `config.yaml`, or `samples.json`, or folders that have one.

    Returns:
        the page.

    Raises:
        SpiralRopeError: there is nothing to report, or a file is damaged.
        OSError: the page cannot be written.
    """
    inside = stages(folder)
    if not (inside or is_stage(folder)):
        raise SpiralRopeError(f"{folder} holds no run", f"a run folder has a {CONFIG_FILE}")
    parts = [part(folder, folder, level=2)] if is_stage(folder) else [*results(folder, 2)]
    for stage in inside:
        name = stage.name
        more = html.links([(f"{name} alone", f"{name}/{REPORT_FILE}")], f"page of {name}")
        has_page = (stage / REPORT_FILE).exists()
        inner = part(stage, folder, level=3)
        parts.append(html.section(2, name, more if has_page else "", inner, anchor=name))
    content = html.page(
        folder.name,
        f"<header><h1>{html.escape(folder.name)}</h1>",
        html.links([(stage.name, f"#{stage.name}") for stage in inside], "stages"),
        "</header>\n<main>",
        *parts,
        "</main>",
        f"<footer>Made by spiralrope {__version__} from the files in this folder.</footer>",
    )
    target = folder / REPORT_FILE
    beside = target.with_name(f".{REPORT_FILE}.{os.getpid()}")
    beside.write_text(content)
    os.replace(beside, target)
    return target


def is_stage(folder: Path) -> bool:
    """Whether a folder is that of one command."""
    return (folder / CONFIG_FILE).is_file() or (folder / FACTS_FILE).is_file()


def stages(folder: Path) -> list[Path]:
    """The stages' folders inside, in the order in which they ran."""
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_stage(entry))
    order = {name: number for number, name in enumerate(STAGES)}
    return sorted(found, key=lambda stage: order.get(stage.name, len(STAGES)))


def part(folder: Path, page: Path, level: int) -> str:
    """Everything about one run.

    Args:
        folder: of the run.
        page: where the page will be, for links.
        level: of its headings.
    """
    training = (folder / CONFIG_FILE).is_file()
    return "\n".join(
        [
            *(about_training(folder) if training else about_samples(folder)),
            *results(folder, level),
            *(drawn_curves(folder, level) if training else ()),
            html.section(level, "Configuration", configuration(folder)),
            html.section(level, "Environment", surroundings(folder)),
            html.section(level, "Do it again", *repeating(folder, page)),
        ]
    )


def about_training(folder: Path) -> list[str]:
    """What was trained, and the figures that matter most."""
    config = read_config(folder / CONFIG_FILE)
    run: TrainingRun = build(RUN_KINDS[config["command"]], config)
    lines = read_metrics(folder)
    last = lines[-1]["step"] if lines else 0
    rope = rope_line(run) if run.rope.enabled else "no RoPE: absolute positions alone"
    found = [("steps", f"{last}" if last == run.total_steps else f"{last} of {run.total_steps}")]
    validations = [line for line in lines if "acc1" in line]
    logged = [line for line in lines if "loss" in line]
    if validations:
        best = max(validations, key=lambda line: line["acc1"])
        found += [
            ("acc@1, last", f"{validations[-1]['acc1']:.2f} %"),
            ("acc@1, EMA", f"{validations[-1]['ema_acc1']:.2f} %"),
            ("acc@1, best", f"{best['acc1']:.2f} %"),
        ]
    if logged:
        found += [
            ("training loss", f"{logged[-1]['loss']:.4f}"),
            ("images per second", f"{logged[-1]['images_per_s']:,.0f}"),
        ]
    what = f"{run.command} of {run.arch}" + (f", from {run.source}" if run.source else "")
    return [
        html.paragraph(f"{what}. Data: {data_line(run)}. Positions: {rope}.", "lead"),
        html.tiles(found),
    ]


def about_samples(folder: Path) -> list[str]:
    """What was drawn, and from which weights."""
    facts = read_facts(folder) or {}
    height, width = facts["image_size"]
    words = (
        f"dit-sample of {facts['arch']} from {facts['source']}: {facts['num']:,} images of "
        f"{height}x{width} px, {facts['sampler']} in {facts['steps']} steps, guidance "
        f"{facts['cfg_scale']:g}, {facts['weights']} weights."
    )
    return [html.paragraph(words, "lead")]


def results(folder: Path, level: int) -> Iterable[str]:
    """Tables and pictures of what came out, as far as there are any."""
    validations = [line for line in read_metrics(folder) if "acc1" in line]
    if validations:
        rows = accuracy_rows(validations)
        shown = html.table("Held-out images, as trained", ACCURACY_COLUMNS, rows, {"weights"})
        yield html.section(level, "Accuracy", shown)
    if rows_of_eval := read_rows(folder / EVAL_FILE):
        sizes = folder / SIZES_FILE
        drawn = html.picture(sizes, "acc@1 against the image size") if sizes.exists() else ""
        yield html.section(level, "Evaluation", evaluation(rows_of_eval), drawn)
    for name in (SAMPLES_FILE, GRID_FILE):
        if (folder / name).is_file():
            alt = f"grid of images that {folder.name} drew"
            yield html.section(level, "Samples", html.picture(folder / name, alt))
            break
    if (folder / FID_FILE).is_file():
        yield html.section(level, "Figures of the images", *scores(folder / FID_FILE))


def evaluation(records: list[Record]) -> str:
    """One row for each set of weights and protocol; what all share stands above."""
    told = {
        "source": [str(each["source"]) for each in records],
        "data": [Path(each["data"]).name for each in records],
        "weights": [f"{each['checkpoint']} {each['weights']}".strip() for each in records],
        "step": ["" if each["step"] is None else str(each["step"]) for each in records],
        "image size": ["x".join(map(str, each["image_size"])) for each in records],
        "crop ratio": [f"{each['crop_ratio']:g}" for each in records],
        "precision": [str(each["precision"]) for each in records],
    }
    varying = {n: cells for n, cells in told.items() if n == "weights" or len(set(cells)) > 1}
    same = [f"{n} {cells[0]}" for n, cells in told.items() if n not in varying and cells[0]]
    best = max(each["acc1"] for each in records)
    figures = [
        (
            f"{each['acc1']:.2f}" + (" (best)" if each["acc1"] == best and len(told) > 1 else ""),
            f"{each['acc5']:.2f}",
            f"{each['loss']:.4f}",
            each["count"],
        )
        for each in records
    ]
    columns = [*varying, "acc@1 %", "acc@5 %", "loss", "images"]
    rows = [[*cells, *found] for *cells, found in zip(*varying.values(), figures, strict=True)]
    caption = ", ".join(same) or "Held-out images"
    return html.table(caption, columns, rows, {"source", "data", "weights", "precision"})


def scores(path: Path) -> list[str]:
    """FID and its relatives, with what they rest on."""
    facts = json.loads(path.read_text())
    rows = []
    for name, (label, better, digits) in LABELS.items():
        if (value := facts.get(name)) is not None:
            spread = facts.get(f"{name}_std")
            told = "" if spread is None else f"{spread:.{digits}f}"
            rows.append((label, f"{value:.{digits}f}", told, better))
    sides = [
        f"{facts[side]['count']:,} images of {facts[side]['path']}"
        if facts[side]["count"]
        else facts[side]["path"]
        for side in ("samples", "reference")
        if facts.get(side)
    ]
    return [
        html.table(" against ".join(sides), ("figure", "value", "±", ""), rows, {"figure", ""}),
        *(html.paragraph(f"Warning: {line}", "note") for line in facts.get("warnings", ())),
    ]


def drawn_curves(folder: Path, level: int) -> Iterable[str]:
    """The curves of a training run."""
    if read_metrics(folder):
        yield html.section(level, "Curves", html.drawing(curves([folder]), folder.name))


def configuration(folder: Path) -> str:
    """Every value, by group, and where it came from."""
    if not (folder / CONFIG_FILE).is_file():
        facts = read_facts(folder) or {}
        facts.pop("versions", None)  # stand with the environment
        rope = facts.pop("rope", {})
        both = {"samples": facts, "rope": rope}
        return html.groups(
            (group, ((name, _short(value), "") for name, value in values.items()))
            for group, values in both.items()
        )
    import yaml

    nested = yaml.safe_load((folder / CONFIG_FILE).read_text())
    origins = _read_json(folder / SOURCES_FILE)
    plain = {name: value for name, value in nested.items() if not isinstance(value, dict)}
    grouped = {"run": plain, **{n: value for n, value in nested.items() if isinstance(value, dict)}}
    return html.groups(
        (
            group,
            ((name, _short(value), origins.get(name, "")) for name, value in values.items()),
        )
        for group, values in grouped.items()
    )


def surroundings(folder: Path) -> str:
    """Where it happened."""
    told = environment.read(folder)
    if not told and (facts := read_facts(folder)):
        told = {"precision": facts["precision"], "versions": facts["versions"]}
    packages = told.pop("versions", {})
    return html.groups(
        [
            ("machine", ((n.replace("_", " "), _short(v), "") for n, v in told.items() if v != "")),
            ("versions", ((name, version, "") for name, version in packages.items())),
        ]
    )


def repeating(folder: Path, page: Path) -> list[str]:
    """The command that does the same into another folder, and the files that are there."""
    names = (
        *(CONFIG_FILE, SOURCES_FILE, ENVIRONMENT_FILE, METRICS_FILE, CURVES_FILE),
        *(EVAL_FILE, SAMPLES_FILE, FACTS_FILE, NPZ_FILE, FID_FILE),
    )
    here = [name for name in dict.fromkeys(names) if (folder / name).is_file()]
    inside = folder.relative_to(page)
    files = [(name, (inside / name).as_posix()) for name in here]
    lines = re.sub(r" --", " \\\\\n  --", command(folder))
    return [html.code(lines), html.links(files, f"files of {folder.name}")]


def command(folder: Path) -> str:
    """A command line that repeats a run."""
    if not (folder / CONFIG_FILE).is_file():
        return _sampling(read_facts(folder) or {}, folder)
    config = read_config(folder / CONFIG_FILE)
    words = ["spiralrope", config["command"]]
    if source := config.get("source"):
        words += ["--init", source] if config["command"] == "dit-train" else [source]
    out = f"{config['out']}-{ANOTHER}"
    return shlex.join([*words, "--config", f"{config['out']}/{CONFIG_FILE}", "--out", out])


def _sampling(facts: dict[str, Any], folder: Path) -> str:
    low, high = facts["cfg_interval"]
    given = {
        **{name: facts[name] for name in DEFAULTS},
        "cfg_scale": f"{facts['cfg_scale']:g}",
        "cfg_channels": facts["cfg_channels"],
        "cfg_interval": f"{low},{high}",
        "classes": ",".join(map(str, facts["classes"])),
        "vae": facts["vae"],
        "image_size": "x".join(map(str, facts["image_size"])),
        "precision": {"float32": "fp32", "bfloat16": "bf16"}[facts["precision"]],
        "ema": facts["weights"] == "ema",
        **{name: facts["rope"][name] for name in _read_json(folder / SOURCES_FILE)},
        "out": f"{folder}-{ANOTHER}",
    }
    words = ["spiralrope", "dit-sample", facts["source"]]
    for name, value in given.items():
        option = "rope" if name == "enabled" else name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value != "":
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else "-" if value in (None, "") else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
