"""`export`: weights to share, as a file or a folder, and onto the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spiralrope_cli.core.config.datasets import (
    BUILT_IN,
    IMAGENET_MEAN,
    IMAGENET_STD,
    STREAM,
    slug_of,
)
from spiralrope_cli.core.config.dit_runs import LATENT_CHANNELS
from spiralrope_cli.core.config.hub import ExportRun
from spiralrope_cli.core.config.models import given_rope, is_dit
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.samples import resolve_vae
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.hub.files import OTHER_DISK, new_path, refuse_existing
from spiralrope_cli.core.hub.source import VaeFiles, find_source, find_vae
from spiralrope_cli.core.runtime.launch import check_space, say_notes
from spiralrope_cli.core.runtime.progress import human_size, say, say_result
from spiralrope_cli.core.runtime.run_folder import read_rows
from spiralrope_cli.core.storage import EVAL_FILE, sha256_of

if TYPE_CHECKING:
    import torch
    from huggingface_hub import ModelCard

    from spiralrope_cli.core.hub.published import NetworkSpec, StateDict
    from spiralrope_cli.core.models.deit import DeiT
    from spiralrope_cli.core.models.dit import DiT
    from spiralrope_cli.core.weights import Weights

EXPORTS_FOLDER = "exports"
CARD_FILE = "README.md"
HEADROOM = 1 << 20  # bytes for names, args and the card beside the tensors
GENERIC_NAMES = ("model", "ema", "checkpoint", "best_checkpoint")
MOST_CLASSES = 1000  # of a pipeline: DiTPipeline takes label 1000 as the null class


def export(given: dict[str, Any]) -> None:
    """Writes weights in another layout, or uploads them; prints the path or the URL."""
    from spiralrope_cli.core.hub import upload

    config: ExportRun = build(ExportRun, {**given, "rope": given_rope(given)})
    if config.push:
        upload.check_rights(config.push)
    settled = settle(config)
    with ExitStack() as stack:
        if config.push and not config.out:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            settled = dataclasses.replace(settled, target=Path(scratch) / settled.target.name)
        target = settled.target
        refuse_existing(target)
        check_space((target.parent, settled.num_bytes), what=target.name, hint=OTHER_DISK)
        (write_published if config.layout == "published" else write_folder)(settled)
        report(settled)
        if config.push:
            say_result(upload.push_folder(target, config.push, private=config.private))


@dataclass(frozen=True)
class Export:
    """What is written, and where."""

    config: ExportRun
    weights: Weights  # the first set
    model: DeiT | DiT  # their network, on the meta device
    sets: tuple[StateDict, ...]  # one set, or raw and EMA; complete, in the order of the network
    vae: VaeFiles | None  # of a pipeline
    target: Path  # file or folder

    @property
    def num_bytes(self) -> int:
        """What it takes on a disk, about."""
        tensors = sum(tensor.nbytes for state in self.sets for tensor in state.values())
        return HEADROOM + tensors + (self.vae.weights.stat().st_size if self.vae else 0)


def settle(config: ExportRun) -> Export:
    """Reads the weights, and chooses the target.

    If `ema` is not given: raw weights, or both sets for the published layout.
    """
    source = find_source(config.source, best=config.best)
    if config.best and source.run != Path(os.path.expanduser(config.source)):
        raise ConfigError(
            f"--best needs a run folder, and {config.source} is not one", "leave --best out"
        )
    from spiralrope_cli.core.load import network_on_meta
    from spiralrope_cli.core.weights import fetch_source, read_weights

    layout, source = config.layout, fetch_source(source)
    weights = read_weights(source, ema=bool(config.ema), rope=config.rope, arch=config.arch)
    if layout == "published" and weights.rope.mixed:
        raise ConfigError(
            f"--layout published has no place for the learned frequencies of {config.source}",
            "use --layout safetensors",
        )
    model = network_on_meta(weights)
    vae = settle_vae(config, weights, model) if layout == "diffusers" else None
    sets: tuple[StateDict, ...] = (whole_state(weights, model),)
    kind = "ema" if weights.ema else "raw" if layout == "published" else ""
    if layout == "published" and config.ema is None:
        other = read_weights(source, ema=True, rope=config.rope, arch=config.arch)
        if other.ema and not weights.ema:
            sets, kind = (*sets, whole_state(other, model)), ""
    kind = "-".join(filter(None, (kind, layout if layout == "diffusers" else "")))
    out = Path(config.out) if config.out else default_target(weights, layout, kind)
    return Export(config, weights, model, sets, vae, out)


def settle_vae(config: ExportRun, weights: Weights, model: DeiT | DiT) -> VaeFiles:
    """The VAE of a pipeline; raises if diffusers' DiTPipeline cannot sample from the weights."""
    args, reason = model.init_args, ""
    channels, classes, size = args["in_chans"], args["num_classes"], args.get("input_size")
    if size is None:
        reason = f"it is a {weights.arch}, no DiT"
    elif channels != LATENT_CHANNELS:
        reason = "it generates pixels, and that pipeline decodes latents"
    elif size[0] != size[1]:
        reason = f"its latents are {size[0]}x{size[1]}, and those of that pipeline are square"
    elif classes > MOST_CLASSES:
        reason = f"it has {classes} classes, and that pipeline takes {MOST_CLASSES} as the null one"
    if reason:
        raise ConfigError(
            f"--layout diffusers: DiTPipeline cannot sample from {config.source}: {reason}",
            "use --layout safetensors",
        )
    trained = weights.config.get("images", {}).get("vae")
    return find_vae(resolve_vae(config.source, channels, trained=trained, given=config.vae))


def whole_state(weights: Weights, model: DeiT | DiT) -> StateDict:
    """The tensors of weights, complete and in the order of their network."""
    from spiralrope_cli.core.load import fit_state_dict

    found = fit_state_dict(weights, model)
    return {name: own_memory(found[name]) for name in model.state_dict()}


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a view, because torch.save would store the whole storage of a view."""
    import torch

    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def default_target(weights: Weights, layout: str, kind: str) -> Path:
    """The default path in `exports/`, named by the weights."""
    source, file = weights.source, weights.file.resolve()
    if source.published:
        name = source.published.folder_name
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
    progress = progress_of(weights)
    content = published_content(
        network_spec(export), raw, averaged, progress=progress, ema=weights.ema
    )
    with new_path(export.target) as beside:
        torch.save(content, beside)


def network_spec(export: Export) -> NetworkSpec:
    """The network, as published files describe it."""
    from spiralrope_cli.core.hub.published import NetworkSpec
    from spiralrope_cli.core.rope import to_2tuple

    weights, model = export.weights, export.model
    return NetworkSpec(
        arch=weights.arch,
        rope=weights.rope,
        num_classes=model.num_classes,
        size=model.init_args["input_size" if is_dit(weights.arch) else "image_size"],
        grid=model.grid,
        pretrain_grid=to_2tuple(weights.options.get("pretrain_grid") or model.grid),
        qk_norm=bool(weights.options.get("qk_norm")),
        class_dropout_prob=weights.config.get("model", {}).get("class_dropout_prob"),
        class_names=weights.class_names,
    )


def write_folder(export: Export) -> None:
    """Writes weights, config and model card: for this package and timm, or as a pipeline."""
    model, names = export.model, export.weights.class_names
    state, metadata, card = export.sets[0], file_metadata(export), model_card(export)
    with new_path(export.target) as beside:
        beside.mkdir()
        if export.vae:
            from spiralrope_cli.diffusers_models import save_pipeline

            dit = cast("DiT", model)
            save_pipeline(dit, beside, state, metadata, export.vae.folder, names)
        else:
            from spiralrope_cli.core.models.pretrained import save_folder

            known = preprocessing(export.weights)
            save_folder(model, beside, state, metadata, preprocessing=known, class_names=names)
        card.save(beside / CARD_FILE)


def file_metadata(export: Export) -> dict[str, str]:
    """Metadata of a `.safetensors` file: what any SOURCE needs, and the config of the run."""
    weights = export.weights
    config = {
        **weights.config,
        "arch": weights.arch,
        "rope": dataclasses.asdict(weights.rope),
        "model": {**weights.config.get("model", {}), **weights.options},
    }
    return {
        "config": json.dumps(without_paths(config) if export.config.push else config),
        **{unit: str(number) for unit, number in progress_of(weights).items()},
        "weights": "ema" if weights.ema else "model",
        "format": "pt",
    }


def without_paths(value: Any) -> Any:
    """A config for everybody: of paths on this machine only the last name."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, str) and STREAM.match(value):
        return slug_of(value)  # a command may say more than others should know
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def model_card(export: Export) -> ModelCard:
    """The model card (README.md), with the metrics that were measured of these weights."""
    config, what = export.config, export.weights.what()
    return export.model.generate_model_card(
        repo=config.push or "",
        name="" if config.push else export.target.name,
        summary=what[:1].upper() + what[1:],
        license=config.license or "unknown",
        data=training_set(export.weights),
        rows=rows_of_weights(export.weights),
        pipeline=config.layout == "diffusers",
    )


def rows_of_weights(weights: Weights) -> list[dict[str, Any]]:
    """Rows of these weights in the `eval.json` next to them or in their run folder."""
    beside = weights.file.parent
    folders = dict.fromkeys((beside, weights.source.run or beside))
    rows = [row for folder in folders for row in read_rows(folder / EVAL_FILE, strict=True)]
    if not rows:
        return []
    digest, kind = sha256_of(weights.file), "EMA" if weights.ema else "raw"
    rows = [row for row in rows if row.get("sha256") == digest and row.get("weights") == kind]
    # A card has no word for labels of ReaL, or for a part of the classes.
    plain = [row for row in rows if row.get("classes") == row.get("num_classes")]
    return [row for row in plain if not row.get("labels")]


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
    row, data = weights.source.published, str(weights.config.get("data", ""))
    if row is not None and not row.listed:
        return "imagenet-1k"
    if data.startswith("hfds/"):
        return "/".join(data.split("/")[1:3])
    return "" if "/" in data or Path(data).exists() else data


def preprocessing(weights: Weights) -> dict[str, Any]:
    """Mean, std and crop ratio as timm names them, where they are known."""
    row, augment = weights.source.published, weights.config.get("augment", {})
    if row is not None and not row.listed:
        augment = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    known = {name: augment[name] for name in ("mean", "std") if name in augment}
    if built_in := BUILT_IN.get(str(weights.config.get("data"))):
        known["crop_pct"] = built_in.defaults["crop_ratio"]
    return known


def report(export: Export) -> None:
    """Prints notes and files, and on stdout the path unless it is uploaded and removed."""
    from spiralrope_cli.core.hub.published import incompatibilities

    weights, target, layout = export.weights, export.target, export.config.layout
    notes = incompatibilities(network_spec(export)) if layout == "published" else []
    if layout == "diffusers" and weights.config.get("model", {}).get("class_dropout_prob") == 0:
        notes.append("they have no null label: only guidance_scale=1.0 is right")
    say_notes([*weights.notes, *notes])
    sets = "raw and averaged (EMA)" if len(export.sets) > 1 else ""
    say(f"{weights.source.given}: {weights.what(sets)}, {layout} layout")
    for path in sorted(target.rglob("*")) if target.is_dir() else [target]:
        if path.is_file():
            name = path.relative_to(target) if target.is_dir() else path.name
            say(f"  {name}: {human_size(path.stat().st_size)}")
    if export.config.out or not export.config.push:
        say_result(str(target))
