"""How fast are guided samples of DiT-S/2 beside diffusers' DiTPipeline? No VAE on either side.

`as they come` is the precision that each takes by itself on this machine: ours is
`--precision auto`, the pipeline's is fp32. Guidance 4, the same number of steps, batch 4 unless
another is given as an argument.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from interleave import CPU, DTYPES, Call, interleaved, median, prepare, ratio, show

from spiralrope_cli import GaussianDiffusion, create_model
from spiralrope_cli.core.config.samples import GuidanceConfig
from spiralrope_cli.core.diffusion.samplers import ddpm, guided
from spiralrope_cli.core.models.factory import cast_matmuls
from spiralrope_cli.core.runtime.device import autocast, pick_precision
from spiralrope_cli.core.runtime.seeds import NoisePerImage

BATCH = int(sys.argv[1]) if len(sys.argv) > 1 else 4
STEPS, SCALE, ROUNDS = 3, 4.0, 9
LABELS = list(range(BATCH))


class NoDecoder(torch.nn.Module):
    """Stands for the pipeline's VAE: latents are its images."""

    config = SimpleNamespace(scaling_factor=1.0)
    device, dtype = CPU, torch.float32

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        """The latents, as they are."""
        return SimpleNamespace(sample=latents)


def ours(dtype: torch.dtype) -> Call:
    model = create_model("dit-s2").eval()
    cast_matmuls(model, dtype)  # as dit-sample does
    diffusion, guidance = GaussianDiffusion(str(STEPS)), GuidanceConfig(cfg_scale=SCALE)

    @torch.inference_mode()
    def call() -> None:
        noise = NoisePerImage(0, LABELS, (4, 32, 32), CPU)
        predict = guided(model, torch.tensor(LABELS), guidance)
        list(ddpm(diffusion, predict, noise.draw(), noise.draw))

    return call


def pipeline(dtype: torch.dtype) -> Call:
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, out_channels=8, num_layers=12
    ).eval()
    pipe = DiTPipeline(model, NoDecoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def call() -> None:
        with autocast(CPU, dtype):
            pipe(LABELS, SCALE, num_inference_steps=STEPS, output_type="pt")

    return call


def main() -> None:
    prepare()
    auto = DTYPES[pick_precision("auto", CPU)[0]]
    sides = {
        "ours, as it comes": ours(auto),
        "DiTPipeline, as it comes": pipeline(torch.float32),
        **{f"ours, {name}": ours(dtype) for name, dtype in DTYPES.items() if dtype != auto},
        **{f"DiTPipeline, {name}": pipeline(t) for name, t in DTYPES.items() if name != "fp32"},
    }
    seconds = interleaved(sides, ROUNDS)
    evaluations = 2 * BATCH * STEPS
    rows = [(name, f"{evaluations / median(seconds[name]):.1f} evaluations/s") for name in sides]
    show(f"guided sampling of {BATCH} images, auto is {auto}", rows)
    pairs = [("as they come", "ours, as it comes", "DiTPipeline, as it comes")]
    if auto == torch.bfloat16:
        pairs += [
            ("fp32", "ours, fp32", "DiTPipeline, as it comes"),
            ("bf16", "ours, as it comes", "DiTPipeline, bf16"),
        ]
    for name, mine, peer in pairs:
        print(f"RATIO ours / DiTPipeline, {name}: {1 / ratio(seconds, mine, peer):.3f}")


if __name__ == "__main__":
    main()
