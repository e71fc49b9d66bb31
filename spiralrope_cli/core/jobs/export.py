"""`export`: weights to share, in the published layout or as safetensors with a model card."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiralrope_cli.core.config.folders import CONFIG_FILE, EVAL_FILE, MODEL_FILE
from spiralrope_cli.core.config.hub import ExportRun
from spiralrope_cli.core.config.models import format_size, is_dit
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.rope import given_rope
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.hub.catalog import ROWS
from spiralrope_cli.core.hub.files import OTHER_DISK, new_path, refuse_existing, sha256_of
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.runtime.launch import say_notes
from spiralrope_cli.core.runtime.progress import human_size, say, say_result
from spiralrope_cli.core.runtime.run_folder import check_space, read_rows

if TYPE_CHECKING:
    import torch

    from spiralrope_cli.core.hub.published import NetworkSpec, StateDict
    from spiralrope_cli.core.weights import Weights

EXPORTS_FOLDER = "exports"
CARD_FILE = "README.md"
CARD_TEMPLATE = Path(__file__).with_name("model_card.md.j2")
HEADROOM = 1 << 20  # bytes for names, args and the card beside the tensors
GENERIC_NAMES = ("model", "ema", "checkpoint", "best_checkpoint")


def export(given: dict[str, Any]) -> None:
    """Writes weights in another layout, and prints the path."""
    rope = given_rope(given)
    config: ExportRun = build(ExportRun, given)
    settled = settle(config, rope)
    refuse_existing(settled.target)
    needed = HEADROOM + sum(tensor.nbytes for state in settled.sets for tensor in state.values())
    check_space((settled.target.parent, needed), what=settled.target.name, hint=OTHER_DISK)
    write = write_published if config.layout == "published" else write_safetensors
    write(settled)
    report(settled, config.layout)


@dataclass(frozen=True)
class Export:
    """What is written, and where."""

    weights: Weights  # the first set
    network: NetworkSpec
    sets: tuple[StateDict, ...]  # one set, or raw and EMA; complete, in the order of the network
    target: Path  # file or folder


def settle(config: ExportRun, rope: dict[str, Any]) -> Export:
    """Reads the weights, and chooses the target.

    If `ema` is not given: raw weights, or both sets for the published layout.
    """
    source = find_source(config.source, best=config.best)
    if config.best and source.run != Path(os.path.expanduser(config.source)):
        raise ConfigError(
            f"--best needs a run folder, and {config.source} is not one",
            "leave --best out",
        )
    from spiralrope_cli.core.weights import read_weights

    layout = config.layout
    weights = read_weights(source, ema=bool(config.ema), rope=rope, arch=config.arch)
    if layout == "published" and weights.rope.mixed:
        raise ConfigError(
            f"--layout published has no place for the learned frequencies of {config.source}",
            "use --layout safetensors",
        )
    network, state = whole_state(weights)
    sets: tuple[StateDict, ...] = (state,)
    kind = "ema" if weights.ema else "raw" if layout == "published" else ""
    if layout == "published" and config.ema is None:
        other = read_weights(source, ema=True, rope=rope, arch=config.arch)
        if other.ema and not weights.ema:
            sets, kind = (state, whole_state(other)[1]), ""
    out = Path(config.out) if config.out else default_target(weights, layout, kind)
    return Export(weights, network, sets, out)


def whole_state(weights: Weights) -> tuple[NetworkSpec, StateDict]:
    """The network of weights, and their tensors, complete and in the order of the network."""
    from spiralrope_cli.core.hub.published import NetworkSpec
    from spiralrope_cli.core.load import fit_state_dict, network_on_meta
    from spiralrope_cli.core.models.dit import DiT
    from spiralrope_cli.core.rope import to_2tuple

    model = network_on_meta(weights)
    found = fit_state_dict(weights, model)
    network = NetworkSpec(
        arch=weights.arch,
        rope=weights.rope,
        num_classes=model.num_classes,
        size=model.input_size if isinstance(model, DiT) else model.image_size,
        grid=model.grid,
        pretrain_grid=to_2tuple(weights.options.get("pretrain_grid") or model.grid),
        qk_norm=bool(weights.options.get("qk_norm")),
        class_dropout_prob=weights.config.get("model", {}).get("class_dropout_prob"),
        class_names=weights.class_names,
    )
    return network, {name: own_memory(found[name]) for name in model.state_dict()}


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a view, because torch.save would store the whole storage of a view."""
    import torch

    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def default_target(weights: Weights, layout: str, kind: str) -> Path:
    """The default path in `exports/`, named by the weights."""
    source, file = weights.source, weights.file.resolve()
    if source.row:
        name = source.row.name.replace("@", "-")
    elif source.run:
        name = f"{source.run.resolve().name}-{file.parent.name}"
    elif file.stem in GENERIC_NAMES or file.stem.isdigit():
        name = f"{file.parent.name}-{file.stem}"
    else:
        name = file.stem
    suffix = {"published": ".pt" if is_dit(weights.arch) else ".pth"}.get(layout, "")
    return Path(EXPORTS_FOLDER) / ("-".join(filter(None, (name, kind))) + suffix)


def write_published(export: Export) -> None:
    """Writes one file in the published layout."""
    import torch

    from spiralrope_cli.core.hub.published import published_content

    weights, raw, averaged = export.weights, export.sets[0], export.sets[-1]
    content = published_content(
        export.network, raw, averaged, progress=progress_of(weights), ema=weights.ema
    )
    with new_path(export.target) as beside:
        torch.save(content, beside)


def write_safetensors(export: Export) -> None:
    """Writes a folder with safetensors, config and model card."""
    import yaml
    from safetensors.torch import save_file

    from spiralrope_cli.core.storage import with_checksum

    weights, target = export.weights, export.target
    config = {
        **weights.config,
        "arch": weights.arch,
        "rope": dataclasses.asdict(weights.rope),
        "model": {**weights.config.get("model", {}), **weights.options},
    }
    metadata = {
        "config": json.dumps(config),
        **{unit: str(number) for unit, number in progress_of(weights).items()},
        "weights": "ema" if weights.ema else "model",
        "format": "pt",
    }
    card = model_card(target.name, weights)
    with new_path(target) as beside:
        beside.mkdir()
        state = export.sets[0]
        save_file(state, beside / MODEL_FILE, with_checksum(state, metadata))
        plain = json.loads(metadata["config"])  # lists, which YAML knows, in place of tuples
        (beside / CONFIG_FILE).write_text(yaml.safe_dump(plain, sort_keys=False))
        (beside / CARD_FILE).write_text(card)


def model_card(name: str, weights: Weights) -> str:
    """The model card (README.md), from the template next to this file."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    # Only the name of the data folder: its path is that of this machine.
    rows = [
        {**row, "data": Path(row["data"]).name, "pixels": format_size(row["image_size"])}
        for row in measured_rows(weights)
    ]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=row["data"],
            dataset_name=row["data"],
            metric_type="accuracy",
            metric_name=f"{metric}, {row['pixels']} px, crop {row['crop_ratio']}",
            metric_value=row[key],
        )
        for row in rows
        for key, metric in (("acc1", "acc@1"), ("acc5", "acc@5"))
    ]
    dit, data, what = is_dit(weights.arch), training_set(weights), weights.what()
    task = "class-conditional-image-generation" if dit else "image-classification"
    card_data = ModelCardData(
        license="unknown",  # only the owner of the weights can give a licence
        library_name="spiralrope",
        tags=["spiral-rope", "rotary-position-embedding", task, "arxiv:2602.03227"],
        pipeline_tag=None if dit else task,
        datasets=[data] if data else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    sizes = {
        option: format_size(value) if isinstance(value, (list, tuple)) else value
        for option, value in weights.options.items()
    }
    card = ModelCard.from_template(
        card_data,
        template_path=str(CARD_TEMPLATE),
        name=name,
        summary=what[:1].upper() + what[1:],
        rows=rows,
        model={"arch": weights.arch, **sizes},
        rope=dataclasses.asdict(weights.rope),
        command="dit-sample" if dit else "eval",
    )
    return f"{card}\n"


def measured_rows(weights: Weights) -> list[dict[str, Any]]:
    """Rows of these weights in the `eval.json` next to them or in their run folder."""
    beside = weights.file.parent
    folders = dict.fromkeys((beside, weights.source.run or beside))
    rows = [row for folder in folders for row in read_rows(folder / EVAL_FILE, strict=True)]
    if not rows:
        return []
    digest, kind = sha256_of(weights.file), "EMA" if weights.ema else "raw"
    return [row for row in rows if row.get("sha256") == digest and row.get("weights") == kind]


def progress_of(weights: Weights) -> dict[str, int]:
    """Step or epoch of the weights; both for our DeiT runs."""
    unit, _, number = weights.progress.partition(" ")
    known = {unit: int(number)} if number.isdigit() else {}
    if is_dit(weights.arch):
        return known
    try:
        per_epoch = weights.config["num_train"] // weights.config["optim"]["batch_size"]
        epoch = known["step"] // per_epoch - 1  # The published code counts from 0.
    except (KeyError, TypeError, ZeroDivisionError):
        return known
    return {**known, "epoch": max(epoch, 0)}


def training_set(weights: Weights) -> str:
    """Name of the training set on the Hub; empty for a folder of this machine."""
    if weights.source.row in ROWS:
        return "imagenet-1k"
    data = str(weights.config.get("data", ""))
    return "" if "/" in data or Path(data).exists() else data


def report(export: Export, layout: str) -> None:
    """Prints notes and files, and on stdout the path."""
    from spiralrope_cli.core.hub.published import incompatibilities

    weights, target = export.weights, export.target
    of_layout = incompatibilities(export.network) if layout == "published" else []
    say_notes([*weights.notes, *of_layout])
    sets = "raw and averaged (EMA)" if len(export.sets) > 1 else ""
    say(f"{weights.source.given}: {weights.what(sets)}, {layout} layout")
    files = [target / name for name in (MODEL_FILE, CONFIG_FILE, CARD_FILE)]
    for path in files if target.is_dir() else [target]:
        say(f"  {path.name}: {human_size(path.stat().st_size)}")
    say_result(str(target))
