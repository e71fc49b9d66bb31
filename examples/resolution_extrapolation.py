"""Does a model work on larger grids than it was trained on? Accuracy over image sizes.

    spiralrope pretrain && python examples/resolution_extrapolation.py [SOURCE]

The validation digits are enlarged, so that the same weights see 4x4, 6x6, ... patches. Positions
are interpolated into the trained range, or extrapolated beyond it. For your own images:
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
    """acc@1 in percent on the validation digits, resized to (side, side) pixels."""
    weights = read_weights(find_source(source), ema=True, rope={"scaling": scaling})
    patch, (height, width) = weights.options["patch_size"], weights.options["image_size"]
    grid = (height // patch, width // patch)
    model = build_network(weights, image_size=(side, side), pretrain_grid=grid)

    val, augment = load_digits()[1], weights.config["augment"]
    images = resize_and_crop(val.images.float(), (side, side), crop_ratio=1.0) / 255
    logits = model((images - augment["mean"][0]) / augment["std"][0])
    return 100 * (logits.argmax(1) == val.labels).float().mean().item()


def main(source: str = "runs/pretrain-deit-ti-digits-r2") -> None:
    print("pixels  interpolate  extrapolate")
    for side in SIDES:
        inside, beyond = (accuracy(source, side, s) for s in ("interpolate", "extrapolate"))
        print(f"{side:6}  {inside:9.2f} %  {beyond:9.2f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
