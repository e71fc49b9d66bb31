"""Do the metrics of `spiralrope fid` equal those of torch-fidelity? Same weights, same real images.

Two times 2000 images of Fashion-MNIST, training against test. Without the published weights
(`spiralrope fetch inception`) random ones do, as long as both sides use the same. Takes some
minutes on two cores; --images 200 shows the same in a fraction of it.

KID is a small difference of large means, and torch-fidelity takes it in float32. Here the means are
80,000 to 95,000 times the difference, so that one unit of float32 in them is half a percent of the
KID of a subset. What comes out depends on the order of summation: with the 2048 columns of both
sides reordered alike, which changes nothing but rounding, torch-fidelity's figure over 100 subsets
came out 3e-5, 2.5e-4 and 3.4e-4 away from exact summation (math.fsum over float64 products), and
with the images of each subset reordered 1e-4. An agreement to 1e-4 with it would be chance: it does
not agree with itself so closely. It is therefore shown in several orders, and fed with float64,
where it agrees with exact summation to 1e-12, as ours does from the same features.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from interleave import show
from random_inception import write_random_weights
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from spiralrope_cli.core.data.memory import load_fashion_mnist

BATCH = 32
CALIBRATION = 48
ORDERS = 3


def theirs(weights: Path, sides: list[Tensor], kid_subset_size: int) -> dict[str, float]:
    """Metrics by torch-fidelity's own functions, under our names.

    Args:
        weights: file of the extractor.
        sides: samples and reference, [N, 3, h, w] uint8.
        kid_subset_size: as ours.
    """
    wanted = ["2048", "logits_unbiased"]
    extractor = FeatureExtractorInceptionV3("inception", wanted, str(weights))
    with torch.inference_mode():
        parts = [[extractor(batch) for batch in side.split(BATCH)] for side in sides]
    (pool, logits), (pool2, _) = (map(torch.cat, zip(*each, strict=True)) for each in parts)
    statistics = [fid_features_to_statistics(each) for each in (pool, pool2)]

    def kid_of(*pair: Tensor) -> dict[str, float]:
        return kid_features_to_metric(*pair, kid_subset_size=kid_subset_size, verbose=False)

    kid, wide = kid_of(pool, pool2), kid_of(pool.double(), pool2.double())
    orders = [
        torch.randperm(pool.shape[1], generator=torch.Generator().manual_seed(seed))
        for seed in range(ORDERS)
    ]
    reordered = {
        f"kid in order {number}": kid_of(pool[:, order], pool2[:, order])[
            "kernel_inception_distance_mean"
        ]
        for number, order in enumerate(orders, 1)
    }
    prc = prc_features_to_metric(pool, pool2, verbose=False, save_cpu_ram=False)
    splits = -(-len(logits) // 5000)
    return {
        "fid": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        "is": isc_features_to_metric(logits, splits, shuffle=False)["inception_score_mean"],
        "kid": kid["kernel_inception_distance_mean"],
        **reordered,
        "kid in float64": wide["kernel_inception_distance_mean"],
        "kid_std in float64": wide["kernel_inception_distance_std"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


def ours(weights: Path, sides: list[Tensor], kid_subset_size: int) -> dict[str, float]:
    """Metrics by the command."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.npz" for name in ("samples", "reference")]
        for path, side in zip(paths, sides, strict=True):
            np.savez(path, side.permute(0, 2, 3, 1).numpy())
        words = [*map(str, paths), "--weights", str(weights), "--json"]
        words += ["--kid-subset-size", str(kid_subset_size)]
        command = [sys.executable, "-m", "spiralrope_cli", "fid", *words]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000, help="of each side")
    parser.add_argument("--weights", type=Path, help="of Inception; without, random ones")
    options = parser.parse_args()
    train, test = (each.images.expand(-1, 3, -1, -1) for each in load_fashion_mnist())
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights or write_random_weights(
            Path(folder) / "random.pth", train[-CALIBRATION:]
        )
        sides = [each[: options.images].contiguous() for each in (train, test)]
        subset = min(1000, options.images // 2)
        mine, other = (by(weights, sides, subset) for by in (ours, theirs))
    rows = [("", f"{'ours':>12} {'torch-fidelity':>15}  relative difference")]
    for name, value in other.items():
        own = mine[name.split()[0]]
        off = abs(own - value) / abs(value)
        rows.append((name, f"{own:12.7f} {value:15.7f}  {off:.1e}"))
    show(f"Fashion-MNIST, {options.images} training images against as many of the test", rows)


if __name__ == "__main__":
    main()
