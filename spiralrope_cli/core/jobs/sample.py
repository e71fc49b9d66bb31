"""`dit-sample`: samples images from a DiT. Settle, plan, work, report.

Modules that load torch are imported inside functions, so that usage errors are fast.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spiralrope_cli import __version__
from spiralrope_cli.core.config.dit_runs import NO_VAE
from spiralrope_cli.core.config.hub import HUB
from spiralrope_cli.core.config.models import format_size, given_rope
from spiralrope_cli.core.config.option import build as build_config
from spiralrope_cli.core.config.samples import (
    GuidanceConfig,
    SampleRun,
    check_chain,
    default_batch_size,
    default_num_samples,
    null_label_notes,
    resolve_image_size,
    resolve_vae,
)
from spiralrope_cli.core.config.training import RUNS_FOLDER, MachineConfig, TrainOptions
from spiralrope_cli.core.hub.source import find_source, find_vae, local_vae
from spiralrope_cli.core.resolve import named_folder
from spiralrope_cli.core.runtime.launch import (
    check_space,
    is_first_process,
    launch,
    say_notes,
    world_size,
)
from spiralrope_cli.core.runtime.progress import counted, say, say_result
from spiralrope_cli.core.runtime.run_folder import write_json
from spiralrope_cli.core.runtime.slurm import WHOLE, Remaining
from spiralrope_cli.core.storage import REPORT_FILE, SOURCES_FILE, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from spiralrope_cli.core.data.sample_files import SampleFiles
    from spiralrope_cli.core.models.dit import DiT
    from spiralrope_cli.core.runtime.distributed import DistContext
    from spiralrope_cli.core.weights import Weights

UNKNOWN = ("vae_sha256", "precision")
"""Metadata that a dry run may lack: the VAE is not downloaded, the device on another machine."""


def sample(given: dict[str, Any]) -> Remaining:
    """Samples the missing images; `given` is field name -> value."""
    options: TrainOptions = build_config(TrainOptions, given)
    options.check_folder(given.get("out", ""), "a folder of samples")
    run, weights = settle(given, options.name, download=not options.dry_run)
    finished = carry_out(run, weights, dry_run=options.dry_run)
    return Remaining(run.out, () if finished else WHOLE)


# ---- settle
def settle(
    given: dict[str, Any], name: str = "", *, download: bool = True
) -> tuple[SampleRun, Weights]:
    """The run and its weights; published weights are downloaded if needed."""
    # Options that need no weights are checked before torch is loaded.
    rope = given_rope(given)
    guidance: GuidanceConfig = build_config(GuidanceConfig, given)
    build_config(MachineConfig, given)
    num_steps = given.get("num_sampling_steps", SampleRun.num_sampling_steps)
    check_chain(given.get("sampler", SampleRun.sampler), num_steps)

    source = find_source(given["source"])

    from spiralrope_cli.core.weights import fetch_source, read_weights

    source = fetch_source(source, download="newest" if download else "never")
    ema, arch = given.get("ema", SampleRun.ema), given.get("arch", "")
    weights = read_weights(source, ema=ema, rope=rope, arch=arch, dit=True)
    network, trained = weights.options, weights.config
    null_label_notes(source.given, trained, guidance.cfg_scale)
    vae = resolve_vae(
        given["source"],
        network["in_chans"],
        trained=trained.get("images", {}).get("vae"),
        given=given.get("vae"),
    )
    image_size = resolve_image_size(
        weights.arch,
        vae,
        trained=network["input_size"],
        given=given.get("image_size"),
        rope=weights.rope.enabled,
    )
    # In a dry run the digest of a VAE that is not downloaded stays empty.
    files = None if vae == NO_VAE else find_vae(vae) if download else local_vae(vae)
    defaults = {
        "num_samples": default_num_samples(trained.get("data", "")),
        "batch_size": default_batch_size(image_size),
        "out": RUNS_FOLDER,
    }
    settled = {
        "file": str(weights.file),
        "arch": weights.arch,
        "sha256": sha256_of(weights.file),
        "vae": vae,
        "vae_sha256": files.sha256() if files else "",
        "rope": rope,
        "num_classes": network["num_classes"],
        "image_size": image_size,
    }
    run: SampleRun = build_config(SampleRun, {**defaults, **given, **settled})
    return replace(run, out=given.get("out") or default_folder(run, weights, name)), weights


def default_folder(run: SampleRun, weights: Weights, name: str) -> str:
    """The default folder; without a date, so that the same command finds it again."""
    of_run, row = weights.source.run, weights.source.published
    stem = of_run.resolve().name if of_run else Path(run.source).stem
    stem = row.folder_name if row and run.source.startswith(HUB) else stem
    guided = f"cfg{run.guidance.cfg_scale:g}" if run.guidance.cfg_scale != 1 else ""
    raw = "" if run.ema else "raw"
    chain = f"{run.sampler}{run.num_sampling_steps}"
    return named_folder("dit-sample", stem, chain, guided, raw, name)


def carry_out(run: SampleRun, weights: Weights, *, dry_run: bool) -> bool:
    """Samples missing images; a dry run only prints the plan. True if nothing was missing."""
    from spiralrope_cli.core.data.sample_files import SampleFiles

    files = SampleFiles(Path(run.out), run.num_samples, run.image_size)
    metadata = metadata_of(run, weights, dry_run=dry_run)
    files.check_same({name: v for name, v in metadata.items() if v or name not in UNKNOWN})
    finished = files.finished(run.png)
    if finished and not dry_run:
        if is_first_process():
            say(f"{run.out} is finished: {run.num_samples} images")
            say_result(str(files.npz))
        return True
    needed, hint = files.bytes_needed(run.png), "use fewer images (--num-samples), or another --out"
    check_space((files.folder, needed), what=f"{run.num_samples} images and their files", hint=hint)
    if is_first_process():
        plan(run, weights, files)
    if not dry_run:
        launch(work, run)
    return finished


def metadata_of(run: SampleRun, weights: Weights, *, dry_run: bool = False) -> dict[str, Any]:
    """Metadata of the samples, for all files."""
    import torch

    from spiralrope_cli.core.runtime.device import PRECISION_WORDS, planned_precision

    precision = planned_precision(run.machine, dry_run=dry_run)
    return {
        "made_by": f"spiralrope {__version__} dit-sample",
        "source": run.source,
        "sha256": run.sha256,
        "weights": "ema" if weights.ema else "raw",
        "trained": weights.progress,
        "arch": weights.arch,
        "data": weights.config.get("data", ""),
        "num_classes": run.num_classes,
        "class_names": list(weights.class_names),
        "rope": asdict(weights.rope),
        "num": run.num_samples,
        "steps": run.num_sampling_steps,
        "sampler": run.sampler,
        **asdict(run.guidance),
        "cfg_interval": list(run.guidance.cfg_interval),
        "classes": list(run.classes),
        "seed": run.seed,
        "vae": run.vae,
        "vae_sha256": run.vae_sha256,
        "image_size": list(run.image_size),
        "precision": PRECISION_WORDS.get(precision, ""),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


# ---- plan
def plan(run: SampleRun, weights: Weights, files: SampleFiles) -> None:
    """Prints the plan on stderr."""
    drawn = run.num_samples - len(files.missing())
    there = f"; {drawn} are finished" if drawn else ""
    vae = run.vae if run.vae_sha256 or run.vae == NO_VAE else f"{run.vae} (to be downloaded)"
    names = dict(enumerate(weights.class_names))
    classes = ",".join(str(names.get(label, label)) for label in run.classes)
    classes = classes or f"random of {run.num_classes}"
    images = f"{run.num_samples} of {format_size(run.image_size)} px"
    chain = f"{run.sampler}, {run.num_sampling_steps} steps, guidance {run.guidance.summary}"
    for name, text in (
        ("samples", run.out),
        ("weights", weights.summary()),
        ("images", f"{images}, VAE {vae}; classes {classes}{there}"),
        ("sampler", f"{chain}, seed {run.seed}"),
        ("batch", f"{world_size(run.machine)} process(es) x {run.batch_size} images"),
    ):
        say(f" {name:<8} {text}")
    null_label = null_label_notes(run.source, weights.config, run.guidance.cfg_scale)
    say_notes([*weights.notes, *run.guidance.notes(), *null_label])


# ---- work
def work(run: SampleRun) -> None:
    """Samples missing images, then writes the results; every worker runs this."""
    import torch

    from spiralrope_cli.core.data.sample_files import SampleFiles
    from spiralrope_cli.core.report.page import leave_report
    from spiralrope_cli.core.runtime import distributed
    from spiralrope_cli.core.runtime.distributed import open_context
    from spiralrope_cli.core.weights import read_weights

    out, files = Path(run.out), SampleFiles(Path(run.out), run.num_samples, run.image_size)
    with open_context(run.machine, out) as ctx, torch.inference_mode():
        # The file of the plan: its run may have saved newer checkpoints since.
        source = replace(find_source(run.source), place=Path(run.file))
        weights = read_weights(source, ema=run.ema, rope=run.rope, arch=run.arch, verify=False)
        metadata = metadata_of(run, weights)
        if ctx.is_first:
            files.begin(metadata)
            distributed.write_environment(out, ctx)
            write_json(out / SOURCES_FILE, dict.fromkeys(run.rope, "option"))
        missing = distributed.all_gather_object(files.missing() if ctx.is_first else [])[0]
        if missing:
            sample_missing(missing, Sampler(run, ctx, weights), files)
        if ctx.is_first:
            files.finish(metadata)
            files.write_grid(metadata)
        distributed.barrier()
        if run.png:
            write_pngs(ctx, files, metadata)
        if ctx.is_first:
            leave_report(out)
            report(run, files)


class Sampler:
    """Samples images by number: noise, class and step noise are functions of (seed, number)."""

    def __init__(self, run: SampleRun, ctx: DistContext, weights: Weights) -> None:
        from spiralrope_cli.core.diffusion.gaussian import GaussianDiffusion
        from spiralrope_cli.core.diffusion.vae import load_vae
        from spiralrope_cli.core.load import at_size, build_network
        from spiralrope_cli.core.models.factory import cast_matmuls, compile_blocks, pays_to_compile

        self.run, self.ctx, self.diffusion = run, ctx, GaussianDiffusion(run.num_sampling_steps)
        changes = at_size(weights, run.input_size, run.rope)
        model = cast("DiT", build_network(weights, ctx.device, **changes))
        cast_matmuls(model, ctx.dtype)
        passes = run.num_samples * self.diffusion.num_steps * (1 + (run.guidance.cfg_scale > 1))
        if pays_to_compile(run.machine.compile, model, ctx.device, passes / ctx.world_size):
            compile_blocks(model, say=ctx.say)
        self.model, self.shape = model, (model.in_chans, *run.input_size)
        self.vae = None if run.vae == NO_VAE else load_vae(find_vae(run.vae).folder, ctx.device)

    def __call__(self, indices: Sequence[int], after_step: Callable[[], None]) -> Tensor | None:
        """Images [B, 3, H, W] uint8 by their numbers; None after a signal."""
        import torch

        from spiralrope_cli.core.data.images import to_uint8
        from spiralrope_cli.core.diffusion.samplers import SAMPLERS, guided
        from spiralrope_cli.core.runtime.seeds import NoisePerImage, drawn_class

        run, ctx = self.run, self.ctx
        noise = NoisePerImage(run.seed, indices, self.shape, ctx.device)
        if run.classes:
            classes = [run.classes[index % len(run.classes)] for index in indices]
        else:
            classes = [drawn_class(run.seed, run.num_classes, index) for index in indices]
        labels = torch.tensor(classes, device=ctx.device)
        predict = guided(self.model, labels, run.guidance)
        for x in SAMPLERS[run.sampler](self.diffusion, predict, noise.draw(), noise.draw):
            if ctx.stop.signal_number:
                return None
            latents = x  # those of the last step are decoded
            after_step()
        return to_uint8(self.vae.decode(latents) if self.vae else latents)


def sample_missing(missing: Sequence[int], sampler: Sampler, files: SampleFiles) -> None:
    """Samples and writes images, until all are finished or a signal comes."""
    ctx, size = sampler.ctx, sampler.run.batch_size
    # Batch i goes to rank i mod world_size, as in edm2. Empty batches fill the last round, because
    # all ranks must take part in `leave_if_asked`.
    batches = [missing[first : first + size] for first in range(0, len(missing), size)]
    batches += [[]] * (-len(batches) % ctx.world_size)
    done, parts = files.num - len(missing), sampler.diffusion.num_steps + 1  # and the decoding
    with counted(
        "images", files.num, shown=ctx.is_first, done=done, unit="images/s", parts=parts
    ) as advance:
        for first in range(0, len(batches), ctx.world_size):
            dealt = batches[first : first + ctx.world_size]
            after_step = partial(advance, sum(map(len, dealt)))  # the other ranks are about as far
            indices = dealt[ctx.rank]
            images = sampler(indices, after_step) if indices else None
            if images is not None:
                files.put(indices, images)
                after_step()
            leave_if_asked(ctx, files)


def leave_if_asked(ctx: DistContext, files: SampleFiles) -> None:
    """Exits after a signal to any process; finished images are kept. A collective."""
    if stop := ctx.stop.agreed(ctx.device, ask_all=True):
        if ctx.is_first:
            drawn = files.num - len(files.missing())
            say(f"stopped with {drawn} of {files.num} images; the same command resumes")
        sys.exit(128 + stop)


def write_pngs(ctx: DistContext, files: SampleFiles, metadata: dict[str, Any]) -> None:
    """Writes one file per image; each process writes a part."""
    from spiralrope_cli.core.runtime import distributed

    missing = distributed.all_gather_object(files.missing_pngs() if ctx.is_first else 0)[0]
    first, end = (files.num * rank // ctx.world_size for rank in (ctx.rank, ctx.rank + 1))
    done = files.num - missing
    with counted("files", files.num, shown=ctx.is_first, done=done, unit="files/s") as advance:
        for _ in files.write_pngs(metadata, range(first, end)):
            advance(ctx.world_size)
            if ctx.stop.signal_number:
                break
    leave_if_asked(ctx, files)


# ---- report
def report(run: SampleRun, files: SampleFiles) -> None:
    """Prints the paths of the results."""
    say_result(f"{run.num_samples} images: {files.npz}")
    say_result(f"grid: {files.grid}")
    say_result(f"report: {files.folder / REPORT_FILE}")
    if run.png:
        say_result(f"files: {files.png(0).parent}")
