"""`report.html`: one page with configuration, results, and the command that repeats a run.

A folder with several stages gets one page with a part for each. The layout is in `page.html.j2`;
this file collects the content from the files in the folder.
"""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from spiralrope_cli import __version__
from spiralrope_cli.core.config.dit_runs import RUN_KINDS, TrainingRun
from spiralrope_cli.core.config.models import RopeConfig, format_size
from spiralrope_cli.core.config.option import build, leaves
from spiralrope_cli.core.config.samples import SampleRun
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.data.sample_files import read_metadata
from spiralrope_cli.core.errors import SpiralRopeError, first_line
from spiralrope_cli.core.plots.curves import curves_figure
from spiralrope_cli.core.report.results import Result, results
from spiralrope_cli.core.runtime.progress import METRICS_FILE, best_validation, read_metrics, say
from spiralrope_cli.core.runtime.run_folder import read_config, read_json
from spiralrope_cli.core.storage import (
    CONFIG_FILE,
    CURVES_FILE,
    ENVIRONMENT_FILE,
    EVAL_FILE,
    FID_FILE,
    METADATA_FILE,
    NPZ_FILE,
    PIPELINE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SOURCES_FILE,
    SWEEP_FILE,
    write_whole,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("pretrain", "finetune", "dit-train", "dit-sample")
"""Folders of a pipeline in their order; other folders follow, by name."""

FILES = (
    *(CONFIG_FILE, SOURCES_FILE, ENVIRONMENT_FILE, METRICS_FILE, CURVES_FILE),
    *(EVAL_FILE, SAMPLES_FILE, METADATA_FILE, NPZ_FILE, FID_FILE),
)
"""Files that a page links to."""

ANOTHER = "again"
"""Suffix of the folder of a repeated run: in the same folder it would be finished already."""

LARGEST_IMAGE = 1_500_000
"""Larger images are downscaled, in bytes."""
IMAGE_SIDE = 1600
JPEG_QUALITY = 85

SHOWN_ITEMS = 20
"""Of a list in a table."""

Tables = Mapping[str, Mapping[str, Any]]
"""Caption -> name -> value."""


class Drawing(NamedTuple):
    """One panel of a figure: attributes and content of an `<svg>` element."""

    view_box: str
    label: str
    inside: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """The content of the page for one folder, in this order; empty parts are left out."""

    name: str
    page: str = ""  # URL of the page of a single stage
    lead: str = ""  # summary
    tiles: Mapping[str, str] = field(default_factory=dict)  # the most important metrics
    results: Sequence[Result] = ()
    curves: Sequence[Drawing] = ()
    configuration: Tables = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)  # origins of these values
    environment: Tables = field(default_factory=dict)
    command: str = ""  # repeats the run in another folder
    files: Sequence[tuple[str, str]] = ()  # (name, address)


def leave_report(folder: Path) -> None:
    """Writes the report of a finished run; an error is only a warning."""
    try:
        write_report(folder)
    except Exception as error:  # noqa: BLE001 - the run itself has succeeded
        say(f"warning: {folder / REPORT_FILE} was not written: {first_line(error)}")


def write_report(folder: Path) -> Path:
    """Writes the page of a run folder, or of a folder with stages."""
    inside, runs = stages(folder), pipelines(folder)
    recorded = any((folder / name).is_file() for name in (PIPELINE_FILE, SWEEP_FILE))
    if not (inside or runs or recorded or is_stage(folder)):
        raise SpiralRopeError(f"{folder} holds no run", f"a run folder has a {CONFIG_FILE}")
    environment = Environment(
        loader=PackageLoader("spiralrope_cli.core", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"in_short": in_short, "data_url": data_url}
    content = environment.get_template("page.html.j2", globals={"zip": zip}).render(
        style=(resources.files("spiralrope_cli") / "data" / "report.css").read_text(),
        version=__version__,
        whole=part(folder, folder) if is_stage(folder) else of_several(folder, runs),
        stages=[part(stage, folder) for stage in inside],
        runs=[(run.name, f"{run.name}/{REPORT_FILE}") for run in runs],
    )
    target = folder / REPORT_FILE
    write_whole(target, content)
    return target


def of_several(folder: Path, runs: Sequence[Path]) -> Part:
    """What stands above the stages of a pipeline, or of a sweep, whose runs share their curves."""
    first = [stage for run in runs for stage in stages(run)[:1] if read_metrics(stage)]
    lead = ""
    if first:
        config = read_config(first[0] / CONFIG_FILE)
        run: TrainingRun = build(RUN_KINDS[config["command"]], config)
        lead = f"{len(runs)} runs: {run.command} of {run.arch}. Data: {run.data_line}."
    curves = drawings(curves_figure(first), folder.name) if first else ()
    return Part(name=folder.name, lead=lead, results=results(folder), curves=curves)


def is_stage(folder: Path) -> bool:
    """Whether a folder is that of a single command."""
    return (folder / CONFIG_FILE).is_file() or (folder / METADATA_FILE).is_file()


def stages(folder: Path) -> list[Path]:
    """Folders of the stages, in their order."""
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_stage(entry))
    order = {name: number for number, name in enumerate(STAGES)}
    return sorted(found, key=lambda stage: order.get(stage.name, len(STAGES)))


def pipelines(folder: Path) -> list[Path]:
    """Folders of pipelines that have a page, as in a sweep."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_stage(entry))
    return [entry for entry in entries if (entry / REPORT_FILE).is_file() and stages(entry)]


def part(folder: Path, page: Path) -> Part:
    """The part of one run; `page` is the folder of the page."""
    training = (folder / CONFIG_FILE).is_file()
    metadata = {} if training else read_metadata(folder) or {}
    lead, tiles = about_training(folder) if training else (about_samples(metadata), {})
    logged, inside = training and read_metrics(folder), folder.relative_to(page)
    return Part(
        name=folder.name,
        page=f"{inside}/{REPORT_FILE}" if (folder / REPORT_FILE).exists() else "",
        lead=lead,
        tiles=tiles,
        results=results(folder),
        curves=drawings(curves_figure([folder]), folder.name) if logged else (),
        configuration=configuration(folder, metadata),
        origins=read_json(folder / SOURCES_FILE),
        environment=machine(folder, metadata),
        command=re.sub(r" --", " \\\\\n  --", repeat_command(folder)),
        files=[(name, (inside / name).as_posix()) for name in FILES if (folder / name).is_file()],
    )


def about_training(folder: Path) -> tuple[str, dict[str, str]]:
    """Summary and most important metrics of a training run."""
    config = read_config(folder / CONFIG_FILE)
    run: TrainingRun = build(RUN_KINDS[config["command"]], config)
    lines = read_metrics(folder)
    last = lines[-1]["step"] if lines else 0
    tiles = {"steps": f"{last}" if last == run.total_steps else f"{last} of {run.total_steps}"}
    if validations := [line for line in lines if "acc1" in line]:
        tiles["acc@1, last"] = f"{validations[-1]['acc1']:.2f} %"
        tiles["acc@1, EMA"] = f"{validations[-1]['ema_acc1']:.2f} %"
        tiles["acc@1, best raw"] = f"{best_validation(validations)['acc1']:.2f} %"
    if scored := [line for line in lines if "fid" in line]:
        tiles["FID, EMA"] = f"{scored[-1]['fid']:.2f}"
    if logged := [line for line in lines if "loss" in line]:
        tiles["training loss"] = f"{logged[-1]['loss']:.4f}"
        tiles["images per second"] = f"{logged[-1]['images_per_s']:,.0f}"
    rope = run.rope.summary if run.rope.enabled else "no RoPE, only absolute positions"
    what = f"{run.command} of {run.arch}" + (f", from {run.source}" if run.source else "")
    return f"{what}. Data: {run.data_line}. Positions: {rope}.", tiles


def about_samples(metadata: dict[str, Any]) -> str:
    return (
        f"dit-sample of {metadata['arch']} from {metadata['source']}: {metadata['num']:,} images "
        f"of {format_size(metadata['image_size'])} px, {metadata['sampler']} in "
        f"{metadata['steps']} steps, guidance {metadata['cfg_scale']:g}, "
        f"{metadata['weights']} weights."
    )


def configuration(folder: Path, metadata: dict[str, Any]) -> Tables:
    """All values of a training run, or of samples, by group."""
    if metadata:
        apart = ("rope", "versions")  # versions are shown with the machine
        own = {name: value for name, value in metadata.items() if name not in apart}
        return {"samples": own, "rope": metadata["rope"]}
    import yaml

    nested = yaml.safe_load((folder / CONFIG_FILE).read_text())
    groups = {name: value for name, value in nested.items() if isinstance(value, dict)}
    return {"run": {n: value for n, value in nested.items() if n not in groups}, **groups}


def machine(folder: Path, metadata: dict[str, Any]) -> Tables:
    """Machine and versions of packages."""
    known = ("precision", "versions")
    found = read_json(folder / ENVIRONMENT_FILE) or {n: metadata[n] for n in known if metadata}
    versions = found.pop("versions", {})
    values = {name.replace("_", " "): value for name, value in found.items() if value != ""}
    return {"machine": values, "versions": versions}


def in_short(value: Any) -> str:
    """A value of a config, for a table."""
    if isinstance(value, list):
        more = [f"... ({len(value)})"] if len(value) > SHOWN_ITEMS else []
        return ", ".join([*map(in_short, value[:SHOWN_ITEMS]), *more]) or "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else "-" if value in (None, "") else str(value)


def repeat_command(folder: Path) -> str:
    """The command line that repeats a run in another folder."""
    origins = read_json(folder / SOURCES_FILE)
    out = f"{folder}-{ANOTHER}"
    if not (folder / CONFIG_FILE).is_file():
        metadata = read_metadata(folder) or {}
        words, given = ["dit-sample", metadata["source"]], _sampling_options(metadata, [*origins])
        known = {**leaves(SampleRun), **leaves(RopeConfig)}
        given["out"] = out
    else:
        config = read_config(folder / CONFIG_FILE)
        words, given = [config["command"]], {"config": folder / CONFIG_FILE, "out": out}
        known = {**leaves(RUN_KINDS[config["command"]]), **leaves(TrainOptions)}
        if source := config.get("source"):
            words += known["source"].typed(source)[config["command"] == "finetune" :]
            # The other RoPE options are those of the weights, and also in the config file.
            rope = RopeConfig.__dataclass_fields__
            given |= {name: config[name] for name in rope if origins.get(name) == "option"}
    for name, value in given.items():
        words += [] if value == "" else known[name].typed(value)
    return shlex.join(["spiralrope", *words])


def _sampling_options(metadata: dict[str, Any], given_rope: list[str]) -> dict[str, Any]:
    """Field name -> value of the options of `dit-sample`, from its metadata."""
    low, high = metadata["cfg_interval"]
    return {
        **{"num_samples": metadata["num"], "num_sampling_steps": metadata["steps"]},
        **{name: metadata[name] for name in ("sampler", "seed")},
        "cfg_scale": f"{metadata['cfg_scale']:g}",
        "cfg_channels": metadata["cfg_channels"],
        "cfg_interval": f"{low},{high}",
        "classes": ",".join(map(str, metadata["classes"])),
        "vae": metadata["vae"],
        "image_size": format_size(metadata["image_size"]),
        "precision": {"float32": "fp32", "bfloat16": "bf16"}.get(metadata["precision"], "tf32"),
        "ema": metadata["weights"] == "ema",
        **{name: metadata["rope"][name] for name in given_rope},
    }


# --- Images inside the page, which loads no other files


def data_url(of: Path | bytes) -> str:
    """A data URL of a PNG; large images are downscaled."""
    kind, content = "png", of if isinstance(of, bytes) else of.read_bytes()
    if len(content) > LARGEST_IMAGE:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            smaller = image.convert("RGB")
            smaller.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        sink = io.BytesIO()
        smaller.save(sink, "jpeg", quality=JPEG_QUALITY)
        kind, content = "jpeg", sink.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def drawings(figure: Figure, name: str) -> list[Drawing]:
    """The panels of a figure as separate SVGs: in a whole figure the text is too small on a phone.

    The figure is changed, so do not use it afterwards. The name is unique on the page.
    """
    import matplotlib

    name = name.encode().hex()  # valid in an id of an element
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for of_all in (*figure.texts, *figure.legends):
        of_all.set_visible(False)
    drawn = []
    for number, axis in enumerate(figure.axes):
        for other in figure.axes:
            other.set_visible(other is axis)
        around = axis.get_tightbbox()  # of what is visible
        box = around.padded(4).transformed(figure.dpi_scale_trans.inverted()) if around else None
        sink = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(
                sink, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None}
            )
        svg = re.sub(r"<metadata>.*?</metadata>", "", sink.getvalue(), flags=re.DOTALL)
        [(view_box, svg)] = re.findall(r'<svg[^>]* viewBox="(.*?)"[^>]*>(.*)</svg>', svg, re.DOTALL)
        # Ids must be unique on the page, and black becomes the colour of the text (dark mode).
        svg = svg.replace("xlink:href", "href").replace("stroke: #000000", "stroke: currentColor")
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{name}-{number}-", svg)
        title = axis.get_title("left") or axis.get_title()
        label = " over ".join(filter(None, (title, axis.get_xlabel())))
        drawn.append(Drawing(view_box, label, svg.strip()))
    return drawn
