"""How many of 200 sampled digits does a small classifier assign to their label?

    spiralrope dit-train && python benchmarks/digits_recognised.py [RUN]

The classifier is trained here, in seconds, on the scans that the run was trained on. Samples are
of the averaged weights, without guidance, by 250 steps of DDPM.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralrope_cli import GaussianDiffusion, load_model
from spiralrope_cli.core.data.memory import MemorySplit, load_digits

NUM_SAMPLES = 200
DEFAULT_RUN = "runs/dit-train-dit-ti2-digits-r0"


def scaled(split: MemorySplit) -> Tensor:
    return split.images.float() / 127.5 - 1


def train_classifier(train: MemorySplit, steps: int = 600) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 64), (64, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3))
    network.append(nn.Linear(128 * 16, 10))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    images, labels = scaled(train), train.labels
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,))
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    run = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_RUN
    train, val = load_digits()
    with torch.enable_grad():
        classifier = train_classifier(train)
    right = classifier(scaled(val)).argmax(1) == val.labels
    print(f"classifier: {right.float().mean():.1%} of {len(right)} validation scans")
    model = load_model(run, ema=True)
    labels = torch.arange(NUM_SAMPLES) % 10
    start = time.perf_counter()
    drawn = GaussianDiffusion("250").sample(model, (NUM_SAMPLES, 1, 8, 8), y=labels)
    print(f"samples: {NUM_SAMPLES} in {time.perf_counter() - start:.0f} s")
    seen = classifier(((drawn.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1).argmax(1)
    for digit in range(10):
        mine = seen[labels == digit]
        print(f"  {digit}: {(mine == digit).sum()} of {len(mine)}, seen {mine.tolist()}")
    print(f"RATIO recognised {(seen == labels).float().mean():.3f}")


if __name__ == "__main__":
    main()
