"""How far does a model see beyond the grid it was trained at? Accuracy over picture sizes.

    spiralrope pretrain && python examples/resolution_extrapolation.py [SOURCE]

The held-out digits are enlarged, so that the same weights look at 4x4, 6x6, ... patches. Positions
are squeezed into the trained grid, or counted on beyond it. On files of your own, the same is
`spiralrope eval SOURCE --image-size 224 --image-size 384 --scaling extrapolate`.
"""

import sys

import torch

from spiralrope_cli.core.data.augment import resize_and_crop
from spiralrope_cli.core.data.memory import load_digits
from spiralrope_cli.core.hub.source import find_source
from spiralrope_cli.core.load import build_network
from spiralrope_cli.core.weights import read_weights

SIDES = (8, 12, 16, 24, 32)


@torch.no_grad()
def accuracy(source: str, side: int, scaling: str) -> float:
    """Percent of the held-out digits that are recognised at a side of so many pixels."""
    weights = read_weights(find_source(source), ema=True, rope={"scaling": scaling})
    patch, (height, width) = weights.options["patch_size"], weights.options["image_size"]
    grid = (height // patch, width // patch)
    model = build_network(weights, image_size=(side, side), pretrain_grid=grid)

    held_out, augment = load_digits()[1], weights.config["augment"]
    pictures = resize_and_crop(held_out.images.float(), (side, side), crop_ratio=1.0) / 255
    logits = model((pictures - augment["mean"][0]) / augment["std"][0])
    return 100 * (logits.argmax(1) == held_out.labels).float().mean().item()


def main(source: str = "runs/pretrain-deit-ti-digits-r2") -> None:
    print("pixels  interpolate  extrapolate")
    for side in SIDES:
        squeezed, counted = (accuracy(source, side, s) for s in ("interpolate", "extrapolate"))
        print(f"{side:6}  {squeezed:9.2f} %  {counted:9.2f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
