"""`report.html`: one page of what a run was, what came out, and how to do it again.

A folder that holds the folders of several stages gets one page with a part for each of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spiralrope_cli import __version__
from spiralrope_cli.core.atomic import write_whole
from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.nested import RUN_KINDS, build, read_config
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.pipelines import FINETUNE, PRETRAIN, SAMPLE, TRAIN
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.samples import SampleRun
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.data.sample_files import FACTS_FILE, read_facts
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.plots.curves import curves
from spiralrope_cli.core.plots.style import Drawing, drawings
from spiralrope_cli.core.report.results import Result, results
from spiralrope_cli.core.runtime.progress import METRICS_FILE, read_metrics, say
from spiralrope_cli.core.runtime.run_folder import (
    CONFIG_FILE,
    CURVES_FILE,
    ENVIRONMENT_FILE,
    EVAL_FILE,
    FID_FILE,
    NPZ_FILE,
    PIPELINE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SOURCES_FILE,
    SWEEP_FILE,
    read_json,
)

TEMPLATE, STYLE = "page.html.j2", "report.css"
STAGES = (PRETRAIN, FINETUNE, TRAIN, SAMPLE)
"""Folders of a pipeline in their order; others come after them, by name."""

ANOTHER = "again"
"""Added to the folder: in its own a repeated run would find itself finished."""

Groups = dict[str, list[tuple[str, str, str]]]
"""Caption -> rows of (name, value, where it came from)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the page says of one folder, in this order; what is empty is left out.

    Attributes:
        name: of the folder.
        page: address of the page of a stage alone.
        lead: what was done, in one sentence.
        tiles: the few numbers that matter most, as (name, value).
        results: what came out.
        curves: of a training run.
        configuration: every value.
        environment: where it happened.
        command: command line that does the same into another folder.
        files: that are there, as (name, address).
    """

    name: str
    page: str = ""
    lead: str = ""
    tiles: Sequence[tuple[str, str]] = ()
    results: Sequence[Result] = ()
    curves: Sequence[Drawing] = ()
    configuration: Groups | None = None
    environment: Groups | None = None
    command: str = ""
    files: Sequence[tuple[str, str]] = ()


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
    template = Environment(
        loader=PackageLoader("spiralrope_cli.core", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    ).get_template(TEMPLATE, globals={"zip": zip})
    content = template.render(
        style=(resources.files("spiralrope_cli") / "data" / STYLE).read_text(),
        version=__version__,
        contents=[(stage.name, f"#{stage.name}") for stage in inside],
        whole=part(folder, folder)
        if is_stage(folder)
        else Part(name=folder.name, results=results(folder)),
        stages=[part(stage, folder) for stage in inside],
        members=[(member.name, f"{member.name}/{REPORT_FILE}") for member in members],
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


def part(folder: Path, page: Path) -> Part:
    """Everything about one run.

    Args:
        folder: of the run.
        page: where the page will be, for links.
    """
    training = (folder / CONFIG_FILE).is_file()
    lead, tiles = about_training(folder) if training else (about_samples(folder), [])
    logged = training and read_metrics(folder)
    names = (
        *(CONFIG_FILE, SOURCES_FILE, ENVIRONMENT_FILE, METRICS_FILE, CURVES_FILE),
        *(EVAL_FILE, SAMPLES_FILE, FACTS_FILE, NPZ_FILE, FID_FILE),
    )
    inside = folder.relative_to(page)
    return Part(
        name=folder.name,
        page=f"{inside}/{REPORT_FILE}" if (folder / REPORT_FILE).exists() else "",
        lead=lead,
        tiles=tiles,
        results=results(folder),
        curves=drawings(curves([folder]), folder.name) if logged else (),
        configuration=configuration(folder),
        environment=environment(folder),
        command=re.sub(r" --", " \\\\\n  --", command(folder)),
        files=[(name, (inside / name).as_posix()) for name in names if (folder / name).is_file()],
    )


def about_training(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """What was trained, and the numbers that matter most."""
    config = read_config(folder / CONFIG_FILE)
    run: TrainingRun = build(RUN_KINDS[config["command"]], config)
    lines = read_metrics(folder)
    last = lines[-1]["step"] if lines else 0
    rope = run.rope.summary if run.rope.enabled else "no RoPE: absolute positions alone"
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
    return f"{what}. Data: {run.data_line}. Positions: {rope}.", found


def about_samples(folder: Path) -> str:
    """What was drawn, and from which weights."""
    facts = read_facts(folder) or {}
    height, width = facts["image_size"]
    return (
        f"dit-sample of {facts['arch']} from {facts['source']}: {facts['num']:,} images of "
        f"{height}x{width} px, {facts['sampler']} in {facts['steps']} steps, guidance "
        f"{facts['cfg_scale']:g}, {facts['weights']} weights."
    )


def configuration(folder: Path) -> Groups:
    """Every value, by group, and where it came from."""
    if not (folder / CONFIG_FILE).is_file():
        facts = read_facts(folder) or {}
        facts.pop("versions", None)  # stand with the environment
        rope = facts.pop("rope", {})
        return _groups({"samples": facts, "rope": rope}, {})
    import yaml

    nested = yaml.safe_load((folder / CONFIG_FILE).read_text())
    plain = {name: value for name, value in nested.items() if not isinstance(value, dict)}
    grouped = {name: value for name, value in nested.items() if isinstance(value, dict)}
    return _groups({"run": plain, **grouped}, read_json(folder / SOURCES_FILE))


def environment(folder: Path) -> Groups:
    """Where it happened."""
    found = read_json(folder / ENVIRONMENT_FILE)
    if not found and (facts := read_facts(folder)):
        found = {"precision": facts["precision"], "versions": facts["versions"]}
    versions = found.pop("versions", {})
    machine = {name.replace("_", " "): value for name, value in found.items() if value != ""}
    return _groups({"machine": machine, "versions": versions}, {})


def _groups(tables: Mapping[str, Mapping[str, Any]], origins: Mapping[str, str]) -> Groups:
    return {
        caption: [(name, _short(value), origins.get(name, "")) for name, value in values.items()]
        for caption, values in tables.items()
        if values
    }


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else "-" if value in (None, "") else str(value)


def command(folder: Path) -> str:
    """A command line that repeats a run, into another folder."""
    out, origins = f"{folder}-{ANOTHER}", read_json(folder / SOURCES_FILE)
    if not (folder / CONFIG_FILE).is_file():
        facts = read_facts(folder) or {}
        words, given = ["dit-sample", facts["source"]], _of_sampling(facts, [*origins])
        known = {**leaves(SampleRun), **leaves(RopeConfig)}
        given["out"] = out
    else:
        config = read_config(folder / CONFIG_FILE)
        words, given = [config["command"]], {"config": folder / CONFIG_FILE, "out": out}
        known = {**leaves(RUN_KINDS[config["command"]]), **leaves(TrainOptions)}
        if source := config.get("source"):
            words += known["source"].typed(source)[config["command"] == "finetune" :]
            # Other options of RoPE are those of the weights, which the config file holds too.
            rope = RopeConfig.__dataclass_fields__
            given |= {name: config[name] for name in rope if origins.get(name) == "option"}
    for name, value in given.items():
        words += [] if value == "" else known[name].typed(value)
    return shlex.join(["spiralrope", *words])


def _of_sampling(facts: dict[str, Any], given_rope: list[str]) -> dict[str, Any]:
    """Field name -> value of the options of `dit-sample`, by what it left."""
    low, high = facts["cfg_interval"]
    return {
        **{name: facts[name] for name in ("num", "steps", "sampler", "seed")},
        "cfg_scale": f"{facts['cfg_scale']:g}",
        "cfg_channels": facts["cfg_channels"],
        "cfg_interval": f"{low},{high}",
        "classes": ",".join(map(str, facts["classes"])),
        "vae": facts["vae"],
        "image_size": "x".join(map(str, facts["image_size"])),
        "precision": {"float32": "fp32", "bfloat16": "bf16"}[facts["precision"]],
        "ema": facts["weights"] == "ema",
        **{name: facts["rope"][name] for name in given_rope},
    }
