"""`report.html`: one page of what a run was, what came out, and how to do it again.

A folder that holds the folders of several stages gets one page with a part for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spiralrope_cli.core.atomic import write_whole
from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.nested import RUN_KINDS, build, read_config
from spiralrope_cli.core.config.pipelines import FINETUNE, PRETRAIN, SAMPLE, TRAIN
from spiralrope_cli.core.data.sample_files import FACTS_FILE, NPZ_FILE, read_facts
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.figures.curves import curves
from spiralrope_cli.core.jobs import report_page as html
from spiralrope_cli.core.jobs.plan import data_line, rope_line
from spiralrope_cli.core.jobs.report_command import command
from spiralrope_cli.core.jobs.report_results import results
from spiralrope_cli.core.runtime.console import say
from spiralrope_cli.core.runtime.report import METRICS_FILE, read_metrics
from spiralrope_cli.core.runtime.run_folder import (
    CONFIG_FILE,
    CURVES_FILE,
    ENVIRONMENT_FILE,
    EVAL_FILE,
    FID_FILE,
    PIPELINE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SOURCES_FILE,
    SWEEP_FILE,
    read_json,
)
from spiralrope_cli.version import __version__

STAGES = (PRETRAIN, FINETUNE, TRAIN, SAMPLE)
"""Folders of a pipeline in their order; others come after them, by name."""


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
    inside, members = stages(folder), pipelines(folder)
    recorded = any((folder / name).is_file() for name in (PIPELINE_FILE, SWEEP_FILE))
    if not (inside or members or recorded or is_stage(folder)):
        raise SpiralRopeError(f"{folder} holds no run", f"a run folder has a {CONFIG_FILE}")
    parts = [part(folder, folder, level=2)] if is_stage(folder) else [*results(folder, 2)]
    for stage in inside:
        name = stage.name
        more = html.links([(f"{name} alone", f"{name}/{REPORT_FILE}")], f"page of {name}")
        has_page = (stage / REPORT_FILE).exists()
        inner = part(stage, folder, level=3)
        parts.append(html.section(2, name, more if has_page else "", inner, anchor=name))
    pages = [(member.name, f"{member.name}/{REPORT_FILE}") for member in members]
    parts.append(html.section(2, "Members", html.links(pages, "pages of the members")))
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
    write_whole(target, content)
    return target


def is_stage(folder: Path) -> bool:
    """Whether a folder is that of one command."""
    return (folder / CONFIG_FILE).is_file() or (folder / FACTS_FILE).is_file()


def stages(folder: Path) -> list[Path]:
    """The stages' folders inside, in the order in which they ran."""
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_stage(entry))
    order = {name: number for number, name in enumerate(STAGES)}
    return sorted(found, key=lambda stage: order.get(stage.name, len(STAGES)))


def pipelines(folder: Path) -> list[Path]:
    """Folders inside that hold stages and have a page, as those of a sweep."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_stage(entry))
    return [entry for entry in entries if (entry / REPORT_FILE).is_file() and stages(entry)]


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
    origins = read_json(folder / SOURCES_FILE)
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
    told = read_json(folder / ENVIRONMENT_FILE)
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


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else "-" if value in (None, "") else str(value)
