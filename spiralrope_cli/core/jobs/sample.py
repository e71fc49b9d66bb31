"""`dit-sample`: images that a diffusion transformer draws. Settle, plan, work, report.

What loads torch is imported where it is needed: a refusal comes without it.
"""

from __future__ import annotations

import functools
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from spiralrope_cli import __version__
from spiralrope_cli.core.config.dit_runs import NO_VAE
from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.nested import build as build_config
from spiralrope_cli.core.config.resolve import RUNS_FOLDER
from spiralrope_cli.core.config.rope import given_rope
from spiralrope_cli.core.config.samples import (
    GuidanceConfig,
    SampleRun,
    check_chain,
    num_samples,
    resolve_image_size,
    resolve_vae,
)
from spiralrope_cli.core.config.training import MachineConfig, TrainOptions
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.files import sha256_of
from spiralrope_cli.core.hub.networks import find_vae, local_vae
from spiralrope_cli.core.hub.source import Source, find_source
from spiralrope_cli.core.runtime.launch import is_first_process, launch, world_size
from spiralrope_cli.core.runtime.progress import console, counted, say, say_result
from spiralrope_cli.core.runtime.run_folder import (
    NPZ_FILE,
    REPORT_FILE,
    SOURCES_FILE,
    check_space,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from spiralrope_cli.core.data.sample_files import SampleFiles
    from spiralrope_cli.core.diffusion.vae import Vae
    from spiralrope_cli.core.runtime.distributed import DistContext
    from spiralrope_cli.core.weights import Weights

JOB = "spiralrope_cli.core.jobs.sample:work"

BATCH_BYTES = 64 * 3 * 256 * 256
"""Pixels of a batch by default: 64 images of 256 px; at most MAX_BATCH of smaller ones."""

MAX_BATCH = 100
SAY_ABOVE = 1 << 30
"""Bytes of images whose checksum takes long enough to be told of."""


def sample(given: dict[str, Any]) -> None:
    """Draws the images that the user wants, as far as they are not there.

    Args:
        given: field name -> value of the options that the user gave.
    """
    own: TrainOptions = build_config(TrainOptions, given)
    own.check_folder(given.get("out", ""))
    run, weights = settle(given, own.name, download=not own.dry_run)
    carry_out(run, weights, dry_run=own.dry_run)


def settle(
    given: dict[str, Any], name: str = "", *, download: bool = True
) -> tuple[SampleRun, Weights]:
    """The complete run.

    Args:
        given: field name -> value, given options alone.
        name: word at the end of the folder's name.
        download: whether published weights and VAEs that are not here are fetched.

    Raises:
        CheckpointError: no diffusion transformer.
        ConfigError: a value that cannot work.
    """
    rope = given_rope(given)
    build_config(GuidanceConfig, given)
    build_config(MachineConfig, given)
    check_chain(given.get("sampler", SampleRun.sampler), given.get("steps", SampleRun.steps))
    source = find_source(given["source"])

    from spiralrope_cli.core.weights import here, read_weights

    weights = read_weights(
        here(source, download=download), ema=given.get("ema", SampleRun.ema), rope=rope
    )
    if not is_dit(weights.arch):
        raise CheckpointError(
            f"{source.given} holds {weights.arch}, a classifier, which draws nothing",
            "dit-sample takes a diffusion transformer; eval takes classifiers",
        )
    network, of_run = weights.options, weights.config
    vae = resolve_vae(
        source.given,
        network["in_chans"],
        trained=of_run.get("pictures", {}).get("vae"),
        given=given.get("vae"),
    )
    image_size = resolve_image_size(
        weights.arch,
        vae,
        trained=network["input_size"],
        given=given.get("image_size"),
        rope=weights.rope.enabled,
    )
    # A dry run leaves the digest of a VAE that is not here empty.
    files = None if vae == NO_VAE else find_vae(vae) if download else local_vae(vae)
    fitting = max(1, min(MAX_BATCH, BATCH_BYTES // (3 * image_size[0] * image_size[1])))
    usual = {"num": num_samples(of_run.get("data", "")), "batch_size": fitting, "out": RUNS_FOLDER}
    settled = {
        "file": str(weights.file),
        "sha256": sha256_of(weights.file),
        "vae_sha256": files.sha256() if files else "",
        "rope": rope,
        "num_classes": network["num_classes"],
        "image_size": image_size,
        "vae": vae,
    }
    run: SampleRun = build_config(SampleRun, {**usual, **given, **settled})
    out = given.get("out") or named_folder(run, source, name)
    return replace(run, out=out), weights


def named_folder(run: SampleRun, source: Source, name: str) -> str:
    """The folder where none was asked for: the same command finds its own."""
    stem = source.run.resolve().name if source.run else Path(source.given).stem
    parts = ["dit-sample", stem, f"{run.sampler}{run.steps}"]
    parts += [f"cfg{run.guidance.cfg_scale:g}"] if run.guidance.cfg_scale != 1 else []
    parts += [] if run.ema else ["raw"]
    parts += [name] if name else []
    return str(Path(RUNS_FOLDER) / re.sub(r"[^\w.-]+", "-", "-".join(parts)))


def carry_out(run: SampleRun, weights: Weights, *, dry_run: bool) -> bool:
    """Draws what is missing, or says that all is there; a dry run shows the plan alone.

    Returns:
        whether all was there before.

    Raises:
        CheckpointError: the folder holds other images.
        DiskError: the images would not fit on the disk.
    """
    drawn = is_drawn(run, weights)
    if drawn and not dry_run:
        if is_first_process():
            say(f"{run.out} is finished: {run.num} images")
            say_result(str(Path(run.out) / NPZ_FILE))
        return True
    plan(run, weights)
    if not dry_run:
        launch(JOB, run)
    return drawn


def facts_of(run: SampleRun, weights: Weights) -> dict[str, Any]:
    """What makes the images, for every file that holds some."""
    import torch

    from spiralrope_cli.core.runtime.device import pick_device, pick_precision

    device = pick_device(run.machine)
    dtype, _ = pick_precision(run.machine.precision, device)
    return {
        "made_by": f"spiralrope {__version__} dit-sample",
        "source": run.source,
        "sha256": run.sha256,
        "weights": "ema" if weights.ema else "raw",
        "trained": weights.progress,
        "arch": weights.arch,
        "data": weights.config.get("data", ""),
        "num_classes": run.num_classes,
        "rope": asdict(weights.rope),
        "num": run.num,
        "steps": run.steps,
        "sampler": run.sampler,
        **asdict(run.guidance),
        "cfg_interval": list(run.guidance.cfg_interval),
        "classes": list(run.classes),
        "seed": run.seed,
        "vae": run.vae,
        "vae_sha256": run.vae_sha256,
        "image_size": list(run.image_size),
        "precision": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def is_drawn(run: SampleRun, weights: Weights) -> bool:
    """Whether all that is asked for is there already.

    Raises:
        CheckpointError: the folder holds other images.
    """
    from spiralrope_cli.core.data.sample_files import SampleFiles

    files = SampleFiles(Path(run.out), run.num, run.image_size)
    facts = facts_of(run, weights)
    if not run.vae_sha256:
        del facts["vae_sha256"]  # without a VAE, or of one that a dry run does not fetch
    files.check_same(facts)
    return files.finished(run.png)


def plan(run: SampleRun, weights: Weights) -> None:
    """Says on stderr what will be drawn.

    Raises:
        DiskError: the images would not fit on the disk.
    """
    from spiralrope_cli.core.data.sample_files import FACTS_FILE, SampleFiles

    files = SampleFiles(Path(run.out), run.num, run.image_size)
    check_space(
        (files.folder, files.bytes_needed(run.png)),
        what=f"{run.num} images and what is made of them",
        hint="use fewer images (--num), or another --out",
    )
    if not is_first_process():
        return
    guidance, guided_by, (height, width) = run.guidance, "none", run.image_size
    if guidance.cfg_scale != 1:
        low, high = guidance.cfg_interval
        channels = "all channels" if guidance.cfg_channels == "all" else "3 channels"
        guided_by = f"{guidance.cfg_scale:g} on {channels}, timesteps {low} to {high}"
    drawn = run.num - len(files.missing()) if (files.folder / FACTS_FILE).exists() else 0
    there = f"; {drawn} are there" if drawn else ""
    vae = run.vae if run.vae_sha256 or run.vae == NO_VAE else f"{run.vae} (to be fetched)"
    classes = ",".join(map(str, run.classes)) if run.classes else f"drawn from {run.num_classes}"
    for name, text in (
        ("samples", run.out),
        ("weights", weights.summary()),
        ("images", f"{run.num} of {height}x{width} px, VAE {vae}; classes {classes}{there}"),
        ("sampler", f"{run.sampler}, {run.steps} steps, guidance {guided_by}, seed {run.seed}"),
        ("batch", f"{run.batch_size} at a time in {world_size(run.machine)} process(es)"),
    ):
        line = Text.assemble(" ", (f"{name:<8}", "bold"), " ", text)
        console(stderr=True).print(line, soft_wrap=True)
    notes = list(weights.notes)
    if guidance.cfg_scale == 1 and guidance != GuidanceConfig():
        notes.append("--cfg-channels and --cfg-interval have no effect: --cfg-scale is 1")
    for note in notes:
        say(f"note: {note}")


def work(run: SampleRun) -> None:
    """Draws what is missing, then writes the results; executed by every worker.

    Raises:
        CheckpointError: the weights or the VAE cannot be read, or the folder is in use.
    """
    import torch

    from spiralrope_cli.core.data.sample_files import SampleFiles
    from spiralrope_cli.core.report.page import leave_report
    from spiralrope_cli.core.runtime import distributed
    from spiralrope_cli.core.runtime.distributed import open_context
    from spiralrope_cli.core.weights import read_weights

    out, files = Path(run.out), SampleFiles(Path(run.out), run.num, run.image_size)
    with open_context(run.machine, out) as ctx, torch.inference_mode():
        # Of the very file that was settled, whatever its run has saved since.
        source = replace(find_source(run.source), place=Path(run.file))
        weights = read_weights(source, ema=run.ema, rope=run.rope)
        facts = facts_of(run, weights)
        if ctx.is_first:
            files.begin(facts)
            distributed.write_environment(out, ctx)
            write_json(out / SOURCES_FILE, dict.fromkeys(run.rope, "option"))
        missing = distributed.all_gather_object(files.missing() if ctx.is_first else [])[0]
        if missing:
            draw_missing(missing, Drawer(run, ctx, weights), files)
        if ctx.is_first:
            if missing and run.num_bytes > SAY_ABOVE:
                say("all are drawn; their checksum is taken, for the archive")
            files.finish(facts)
            files.write_grid(facts)
        distributed.barrier()
        if run.png:
            write_pngs(ctx, files, facts)
        if ctx.is_first:
            leave_report(out)
            report(run, files)


class Drawer:
    """Draws images by their numbers: (seed, number) decides noise, class and step noise.

    Args:
        run: what to draw.
        ctx: where it happens.
        weights: the network's.
    """

    def __init__(self, run: SampleRun, ctx: DistContext, weights: Weights) -> None:
        import torch

        from spiralrope_cli.core.diffusion.gaussian import GaussianDiffusion
        from spiralrope_cli.core.diffusion.vae import load_vae
        from spiralrope_cli.core.kernels import cast_blocks
        from spiralrope_cli.core.load import at_size, build
        from spiralrope_cli.core.models.dit import DiT

        self.run, self.ctx = run, ctx
        model = build(weights, ctx.device, **at_size(weights, run.input_size, run.rope))
        if not isinstance(model, DiT):
            raise TypeError(f"{weights.arch} is no diffusion transformer")
        if ctx.dtype != torch.float32:
            cast_blocks(model.blocks, ctx.dtype)
        if run.machine.compile:
            model.compile()
        self.model, self.diffusion = model, GaussianDiffusion(run.steps)
        self.shape = (model.in_chans, *run.input_size)
        self.vae: Vae | None = None
        if run.vae != NO_VAE:
            self.vae = load_vae(find_vae(run.vae).folder, ctx.device)

    def __call__(self, numbers: Sequence[int], each_step: Callable[[], None]) -> Tensor | None:
        """[B, 3, H, W] uint8 of the images with these numbers; None where a signal came."""
        import torch

        from spiralrope_cli.core.data.images import to_levels
        from spiralrope_cli.core.diffusion.samplers import BY_NAME, guided
        from spiralrope_cli.core.runtime.device import autocast
        from spiralrope_cli.core.runtime.seeds import NoisePerImage, drawn_class

        run, ctx = self.run, self.ctx
        noise = NoisePerImage(run.seed, numbers, self.shape, ctx.device)
        classes = [
            run.classes[number % len(run.classes)]
            if run.classes
            else drawn_class(run.seed, run.num_classes, number)
            for number in numbers
        ]
        labels = torch.tensor(classes, device=ctx.device)
        with autocast(ctx.device, ctx.dtype):
            predict = guided(self.model, labels, run.guidance)
            for x in BY_NAME[run.sampler](self.diffusion, predict, noise.draw(), noise.draw):
                if ctx.stop.signal_number:
                    return None
                latents = x
                each_step()
        return to_levels(self.vae.decode(latents) if self.vae else latents)


def draw_missing(missing: Sequence[int], draw: Drawer, files: SampleFiles) -> None:
    """Draws images and puts them at their places, until all are there or a signal comes."""
    from spiralrope_cli.core.runtime import distributed

    ctx, size = draw.ctx, draw.run.batch_size
    at_once = size * ctx.world_size
    with counted(
        "images",
        files.num,
        shown=ctx.is_first,
        done=files.num - len(missing),
        unit="images/s",
        parts=draw.diffusion.num_steps + 1,  # the last part is the picture of the latents
    ) as advance:
        for first in range(0, len(missing), at_once):
            numbers = missing[first : first + at_once]
            # At the end some processes may be without; they stay, to stop with the others.
            mine = numbers[ctx.rank * size : (ctx.rank + 1) * size]
            each_step = functools.partial(advance, len(numbers))  # all are about as far
            drawn = draw(mine, each_step) if mine else None
            if drawn is not None:
                files.put(mine, drawn)
                each_step()
            leave_if_asked(ctx, files)
    distributed.barrier()


def leave_if_asked(ctx: DistContext, files: SampleFiles) -> None:
    """Ends after a signal to any process; what is drawn stays."""
    from spiralrope_cli.core.runtime import distributed

    stop = ctx.stop.agreed(ctx.device, ask_all=True)
    if not stop:
        return
    distributed.barrier()
    if ctx.is_first:
        there = files.num - len(files.missing())
        say(f"stopped with {there} of {files.num} images; the same command goes on")
    sys.exit(128 + stop)


def write_pngs(ctx: DistContext, files: SampleFiles, facts: dict[str, Any]) -> None:
    """A file for every image; each process writes its part of them."""
    from spiralrope_cli.core.runtime import distributed

    missing = distributed.all_gather_object(files.missing_pngs() if ctx.is_first else 0)[0]
    ends = [files.num * rank // ctx.world_size for rank in (ctx.rank, ctx.rank + 1)]
    already = files.num - missing
    with counted("files", files.num, shown=ctx.is_first, done=already, unit="files/s") as advance:
        for _ in files.write_pngs(facts, range(*ends)):
            advance(ctx.world_size)
            if ctx.stop.signal_number:
                break
    leave_if_asked(ctx, files)


def report(run: SampleRun, files: SampleFiles) -> None:
    """Says where the results are."""
    say_result(f"{run.num} images: {files.npz}")
    say_result(f"grid: {files.grid}")
    say_result(f"report: {files.folder / REPORT_FILE}")
    if run.png:
        say_result(f"files: {files.png(0).parent}")
