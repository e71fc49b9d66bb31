"""What does a train step of DiT-S/2 at 256 px cost with the VAE in it, and from cached latents?

The VAE has the published one's shape and random weights, and computes in fp32 as in `dit-train`;
the transformer in both precisions. Reading the cache is part of its step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from interleave import CPU, DTYPES, Call, interleaved, median, prepare, ratio, show, train_step
from torch import Tensor

from spiralrope_cli import GaussianDiffusion, create_model
from spiralrope_cli.core.data import latents
from spiralrope_cli.core.data.batches import DrawnLatents, from_cache
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.data.loader import BatchIndices
from spiralrope_cli.core.data.shards import CachePlan
from spiralrope_cli.core.diffusion.vae import Vae, sample_posterior

BATCH, ROUNDS, CACHED = 8, 2, 64
WIDTHS = (128, 256, 512, 512)


def random_vae(widths: tuple[int, ...] = WIDTHS) -> Vae:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
    )
    return Vae(model)


def random_cache(folder: Path, count: int = CACHED) -> LatentCache:
    plan = CachePlan(
        data="random",
        class_names=("one",),
        num_files=count,
        files_sha256="",
        image_size=(256, 256),
        vae="random",
        vae_sha256="",
        precision="float32",
        shard_size=count,
    )
    plain, mirrored = torch.rand(2, count, 2, *plan.latent_shape)
    labels = torch.zeros(count, dtype=torch.int64)
    latents.write_shard(folder, plan, 0, plain, mirrored, labels, {})
    return LatentCache(folder)


def main() -> None:
    prepare()
    diffusion, noise = GaussianDiffusion(), torch.randn(2, BATCH, 4, 32, 32)
    images = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    t, labels = torch.randint(0, 1000, (2, BATCH))
    vae = random_vae()

    def with_vae() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            return vae.encode(images / 127.5 - 1)

    def step(dtype: str, posterior: Callable[[], tuple[Tensor, Tensor]]) -> Call:
        model = create_model("dit-s2")

        def loss() -> Tensor:
            x0 = sample_posterior(*posterior(), noise[0])
            return diffusion.training_losses(model, x0, t, noise[1], y=labels)["loss"].mean()

        return train_step(model, dtype, loss)

    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(Path(folder))
        random = (torch.randint(CACHED, (BATCH,)).tolist() for _ in range(10**6))
        indices = (BatchIndices(numbers, numbers) for numbers in random)
        batches = from_cache(DrawnLatents(cache, seed=0, hflip=0.5), CPU, 1, indices)

        def from_disk() -> tuple[Tensor, Tensor]:
            batch = next(batches)
            assert batch.std is not None
            return batch.images, batch.std

        for dtype in DTYPES:
            sides = {
                "from the cache": step(dtype, from_disk),
                "with the VAE": step(dtype, with_vae),
            }
            seconds = interleaved(sides, ROUNDS, warmup=1)
            rows = [(name, f"{BATCH / median(seconds[name]):.2f} images/s") for name in seconds]
            faster = ratio(seconds, "with the VAE", "from the cache")
            show(f"train step, DiT-S/2 in {dtype}", [*rows, ("RATIO cache / VAE", f"{faster:.1f}")])


if __name__ == "__main__":
    main()
