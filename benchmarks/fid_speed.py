"""How fast is `spiralrope fid` beside torch-fidelity and pytorch-fid?

Features of the same 256-pixel images in batches of 32 by the same random weights, and the distance
between the same two statistics of 2048 features. pytorch-fid is left out unless it is installed:
pip install --no-deps pytorch-fid
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from interleave import CPU, interleaved, median, prepare, ratio, show
from random_inception import write_random_weights
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric

from spiralrope_cli.core.data.images import ImageBatch
from spiralrope_cli.core.data.memory import load_digits
from spiralrope_cli.core.metrics.features import in_features
from spiralrope_cli.core.metrics.inception import build_extractor
from spiralrope_cli.core.metrics.scores import frechet_distance
from spiralrope_cli.core.runtime.distributed import DistContext, StopRequest

BATCH, BATCHES, SIZE, ROUNDS = 32, 2, 256, 3
NUM_FEATURES = 2048
HAS_PYTORCH_FID = importlib.util.find_spec("pytorch_fid") is not None


def feature_sides(weights: Path) -> dict[str, Callable[[], object]]:
    """Name -> a call that computes pool features of all images."""
    images = torch.randint(0, 256, (BATCH * BATCHES, SIZE, SIZE, 3), dtype=torch.uint8)
    ctx = DistContext(0, 1, CPU, "fp32", "", StopRequest())
    extractor = build_extractor(torch.load(weights), weights)
    piece = -(-BATCH // torch.get_num_threads())

    def ours() -> None:
        batches = [
            ImageBatch(list(range(len(part))), [part.permute(0, 3, 1, 2)])
            for part in images.split(piece)
        ]
        for _ in in_features(batches, extractor, ["fid"], ctx):
            pass

    original = FeatureExtractorInceptionV3("inception", ["2048"], str(weights))
    batches = images.permute(0, 3, 1, 2).contiguous().split(BATCH)

    @torch.inference_mode()
    def torch_fidelity() -> None:
        for batch in batches:
            original(batch)

    sides: dict[str, Callable[[], object]] = {"ours": ours, "torch-fidelity": torch_fidelity}
    if HAS_PYTORCH_FID:
        from pytorch_fid import inception

        inception.load_state_dict_from_url = lambda *args, **more: torch.load(weights)
        other = inception.InceptionV3([3]).eval()

        @torch.inference_mode()
        def pytorch_fid() -> None:
            for batch in batches:
                other(batch / 255)

        sides["pytorch-fid"] = pytorch_fid
    return sides


def statistics(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features that are cut off at 0 and depend on each other."""
    mixing = torch.randn(NUM_FEATURES, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    mixing *= torch.logspace(0, -3, NUM_FEATURES)
    draw = torch.randn(num_images, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))
    features = (draw @ mixing.T).relu().double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def distance_sides(num_images: int) -> dict[str, Callable[[], float]]:
    """Name -> a call that computes the distance of two statistics of so many images."""
    one, other = statistics(num_images, 1), statistics(num_images, 2)
    tensors = [torch.from_numpy(each) for each in (*one, *other)]
    keys = ("mu", "sigma")
    pair = [dict(zip(keys, each, strict=True)) for each in (one, other)]
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: frechet_distance(*tensors),
        "torch-fidelity": lambda: fid_statistics_to_metric(*pair, False)[
            "frechet_inception_distance"
        ],
    }
    if HAS_PYTORCH_FID:
        from pytorch_fid.fid_score import calculate_frechet_distance

        sides["pytorch-fid"] = lambda: calculate_frechet_distance(*one, *other)
    return sides


def quietly(call: Callable[[], float]) -> float:
    """Its value, without what it warns of and prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        return call()


def main() -> None:
    prepare()
    if not HAS_PYTORCH_FID:
        print("pytorch-fid is not installed and left out: pip install --no-deps pytorch-fid")
    with tempfile.TemporaryDirectory() as folder:
        digits = load_digits()[1].images[:32].mul(15).to(torch.uint8).expand(-1, 3, -1, -1)
        sides = feature_sides(write_random_weights(Path(folder) / "random.pth", digits))
        seconds = interleaved(sides, ROUNDS, warmup=1)
    total = BATCH * BATCHES
    rows = [(name, f"{total / median(each):.1f} images/s") for name, each in seconds.items()]
    rows += [
        (f"RATIO ours / {peer}", f"{1 / ratio(seconds, 'ours', peer):.2f}")
        for peer in list(sides)[1:]
    ]
    show(f"features of {SIZE}-pixel images, batch {BATCH}", rows)
    for words, num_images in (("full rank", 6000), ("singular", 2000)):
        distances = distance_sides(num_images)
        values = {name: quietly(call) for name, call in distances.items()}
        seconds = interleaved(
            {name: (lambda call=call: quietly(call)) for name, call in distances.items()},
            rounds=1 if len(distances) > 2 else 2,
            warmup=0,
        )
        rows = [
            (name, f"{median(seconds[name]):6.2f} s  {value:.8f}") for name, value in values.items()
        ]
        for peer in list(distances)[1:]:
            off = abs(values["ours"] / values[peer] - 1)
            faster = 1 / ratio(seconds, "ours", peer)
            rows.append((f"RATIO ours / {peer}", f"{faster:.1f} x as fast, {off:.0e} apart"))
        show(f"distance between two statistics, {words}", rows)


if __name__ == "__main__":
    main()
