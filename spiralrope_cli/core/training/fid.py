"""FID of the EMA weights while a DiT trains: images of `dit-sample`, metric and checks of `fid`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import NO_VAE, DiTRun
from spiralrope_cli.core.config.fid import FeatureMachine, FidRun
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.samples import (
    GuidanceConfig,
    SampleRun,
    decoder_of,
    default_batch_size,
)
from spiralrope_cli.core.data.image_sets import Side, digest_of, inspect_side
from spiralrope_cli.core.data.images import ImageBatch, to_uint8
from spiralrope_cli.core.data.npz import POOL_SIZE, ReferenceCache, read_statistics
from spiralrope_cli.core.diffusion.gaussian import GaussianDiffusion
from spiralrope_cli.core.diffusion.samplers import SAMPLERS, guided
from spiralrope_cli.core.diffusion.vae import load_vae
from spiralrope_cli.core.errors import DataError, TrainingError
from spiralrope_cli.core.metrics.features import in_features, measure_side
from spiralrope_cli.core.metrics.inception import build_extractor
from spiralrope_cli.core.metrics.scores import Moments, frechet_distance
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.runtime import distributed
from spiralrope_cli.core.runtime.device import allow_tf32, autocast
from spiralrope_cli.core.runtime.distributed import DistContext
from spiralrope_cli.core.runtime.progress import Reporter, read_metrics
from spiralrope_cli.core.runtime.seeds import NoisePerImage, drawn_class
from spiralrope_cli.core.training.step import TrainState, is_sharded

PARTS = ("fid",)
FindInception = Callable[[str, str], tuple[Path, str]]


def settle_fid(config: DiTRun, find_inception: FindInception) -> tuple[FidRun, Side, str]:
    """The run of `fid`, its reference and its protocol, checked before anything is computed.

    `find_inception` returns file and SHA-256 of the Inception weights, or says how to get them.

    Raises:
        DataError: the reference has no images, or statistics that do not fit.
    """
    given = config.fid
    side = inspect_side(given.fid_reference, "--fid-reference")
    path, sha256 = find_inception(given.fid_weights, "--fid-weights")
    run = FidRun(
        samples=config.out,
        reference=given.fid_reference,
        weights=str(path),
        select=PARTS,
        batch_size=FidRun.batch_size,
        machine=build(FeatureMachine, {**vars(config.machine), "precision": "fp32"}),
    )
    protocol = run.protocol(sha256)
    if "fid" in side.stored:
        read_statistics(Path(side.path), "fid")  # raises if it is not a covariance
        if side.protocol not in ("", protocol):
            raise DataError(
                "statistics with different protocols cannot be compared",
                f"--fid-reference: {side.protocol}; this run: {protocol}",
            )
        return run, side, protocol
    if side.images is None:
        raise DataError(f"--fid-reference {side.path} holds no images, and no mu and sigma")
    return run, replace(side, needed=PARTS), protocol


class FidOfTraining:
    """Computes the FID of the EMA weights, in all processes.

    Image i is that of `dit-sample` with its default seed, sampler and guidance: a function of seed
    and i, and of the weights. So the FID does not depend on the number of processes, and the random
    numbers of training do not depend on the FID.

    Every process makes one. `find_inception` is that of `settle_fid`, `load_weights` reads a file
    of weights, and `find_vae` finds the files of a VAE by its name.
    """

    def __init__(
        self,
        config: DiTRun,
        ctx: DistContext,
        find_inception: FindInception,
        load_weights: Callable[[Path], Any],
        find_vae: Callable[[str], Any],
    ) -> None:
        run, side, protocol = settle_fid(config, find_inception)
        self.config, self.ctx = config, ctx
        self.exact = replace(ctx, precision="fp32")  # whatever training has
        path = Path(run.weights)
        # Without tensor cores, GPUs convolve planes faster than channels.
        planes = ctx.device.type == "cuda"
        network = build_extractor(load_weights(path), path, planes=planes).to(ctx.device)
        self.network = network
        cache = None
        if ctx.is_first and side.needed:
            how = f"{protocol}, skip_bad {run.machine.skip_bad}"
            cache = ReferenceCache(digest_of(side), how)
        with self.in_fp32():
            self.reference = measure_side(run, self.exact, side, lambda: network, cache)
        vae = config.images.vae
        self.vae = load_vae(find_vae(decoder_of(vae)).folder, ctx.device) if vae != NO_VAE else None
        self.diffusion = GaussianDiffusion(config.fid.fid_sampling_steps)

    def __call__(self, state: TrainState, reporter: Reporter) -> int:
        """Computes and logs the FID, unless the log has it; the number of a signal that stops it.

        Every process must call this.
        """
        config, ctx, num = self.config, self.ctx, self.config.fid.fid_num
        model = cast(DiT, state.ema.module)
        lines = read_metrics(Path(config.out)) if ctx.is_first else []
        known = any("fid" in line and line["step"] == state.step for line in lines)
        if distributed.all_gather_object(known)[0]:
            return 0
        moments, size = Moments(POOL_SIZE, ctx.device), default_batch_size(config.image_size)
        batches = [range(first, min(first + size, num)) for first in range(0, num, size)]
        parts = self.diffusion.num_steps + 1  # and the features
        with reporter.counting(f"FID at step {state.step}, images", num, parts) as advance:
            # Batch i goes to rank i mod world_size, so batches are the same for any number of them.
            for first in range(0, len(batches), ctx.world_size):
                dealt = batches[first : first + ctx.world_size]
                mine = dealt[ctx.rank] if ctx.rank < len(dealt) else range(0)
                after_step = partial(advance, sum(map(len, dealt)))  # others are about as far
                # The forward pass of a sharded network is a collective: all processes draw.
                drawn = mine or dealt[0] if is_sharded(model) else mine
                images = self.draw(model, drawn, after_step) if drawn else None
                if stop := ctx.stop.agreed(ctx.device, ask_all=True):
                    return stop
                if images is not None and mine:
                    self.add(images, moments)
                after_step()
        moments.merge_processes()
        if ctx.is_first:
            statistics = moments.mean, moments.covariance()
            fid = frechet_distance(*statistics, *self.reference.stats["fid"])
            if not math.isfinite(fid):
                raise TrainingError(f"the FID is not finite at step {state.step}")
            epoch = state.step / config.steps_per_epoch
            reporter.scored(state.step, {"epoch": epoch, "fid": fid, "fid_num": num})
        return 0

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Without TF32, which training may have."""
        allow_tf32(False)
        try:
            yield
        finally:
            allow_tf32(self.ctx.device.type == "cuda" and self.ctx.precision != "fp32")

    @torch.no_grad()
    def draw(
        self, model: DiT, indices: Sequence[int], after_step: Callable[[], None]
    ) -> Tensor | None:
        """Images [B, 3, H, W] uint8 by their numbers; None after a signal."""
        config, ctx, seed = self.config, self.ctx, SampleRun.seed
        noise = NoisePerImage(seed, indices, config.input_shape, ctx.device)
        classes = [drawn_class(seed, config.model.num_classes, index) for index in indices]
        predict = guided(model, torch.tensor(classes, device=ctx.device), GuidanceConfig())
        chain = SAMPLERS[SampleRun.sampler]
        with autocast(ctx.device, ctx.dtype):
            for x in chain(self.diffusion, predict, noise.draw(), noise.draw):
                if ctx.stop.signal_number and not is_sharded(model):
                    return None
                latents = x  # those of the last step are decoded
                after_step()
        return to_uint8(self.vae.decode(latents) if self.vae else latents)

    def add(self, images: Tensor, moments: Moments) -> None:
        """Adds the features of images."""
        cores = torch.get_num_threads() if self.ctx.device.type == "cpu" else 1
        parts = images.split(-(-len(images) // cores))
        batches = [ImageBatch(list(range(len(part))), [part]) for part in parts]
        with self.in_fp32():
            for _, features in in_features(batches, self.network, PARTS, self.exact):
                moments.add(cast(dict[str, Tensor], features)["pool"])
