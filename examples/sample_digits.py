"""Sample digits from a DiT in Python, with guidance: one column per class.

spiralrope dit-train && python examples/sample_digits.py [SOURCE [OUT.png [STEPS]]]
"""

import sys

import torch

from spiralrope_cli import GaussianDiffusion, load_model
from spiralrope_cli.core.config.samples import GuidanceConfig
from spiralrope_cli.core.data.images import image_grid, to_uint8
from spiralrope_cli.core.diffusion.samplers import guided

ROWS = 4


@torch.no_grad()
def sample(source: str, steps: str = "50", cfg_scale: float = 2.0) -> torch.Tensor:
    """[ROWS * num_classes, C, H, W] in [-1, 1], by DDIM."""
    model = load_model(source, ema=True)
    labels = torch.arange(model.num_classes).repeat(ROWS)
    noise = torch.randn(
        len(labels), model.in_chans, *model.input_size, generator=torch.Generator().manual_seed(0)
    )
    predict = guided(model, labels, GuidanceConfig(cfg_scale=cfg_scale, cfg_channels="all"))
    diffusion = GaussianDiffusion(steps)
    return diffusion.sample(
        lambda x, t: predict(x, int(t[0])), noise.shape, sampler="ddim", noise=noise
    )


def main(
    source: str = "runs/dit-train-dit-ti2-digits-r0", out: str = "digits.png", steps: str = "50"
) -> None:
    images = sample(source, steps)
    if images.shape[1] not in (1, 3):
        sys.exit(f"{source} samples latents; spiralrope dit-sample decodes them")
    image_grid(to_uint8(images), columns=len(images) // ROWS).save(out)
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
