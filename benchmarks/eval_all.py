"""Does `eval --all` cost one start-up and eight forward passes?

Whole processes, deit-ti on fashion-mnist's 10 000 test images, beside eight separate calls. A
forward pass is timed in this process: logits and sums over all 10 000 images, normalised
beforehand, in the precision of the command, between the separate calls. A start-up is a separate
call less a forward pass.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from interleave import median, prepare, show

from spiralrope_cli import load_model
from spiralrope_cli.core.config.datasets import EvalProtocol
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data.batches import ValidationImages
from spiralrope_cli.core.runtime.device import DTYPES, autocast, pick_precision
from spiralrope_cli.core.training.classification import measure_accuracy

CPU = torch.device("cpu")
PROTOCOL = EvalProtocol(
    data="fashion-mnist",
    num_val=10000,
    image_size=(28, 28),
    in_chans=1,
    crop_ratio=1.0,
    mean=(0.2860,),
    std=(0.3530,),
)


def spiralrope(*words: str) -> float:
    """Seconds of one whole process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "spiralrope_cli", *words]
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - start


def make_run(folder: Path) -> None:
    """Two steps of training, with a copy of the checkpoint as the best one, of step 1."""
    few = ("--max-steps", "2", "--batch-size", "32", "--micro-batch-size", "32")
    spiralrope("pretrain", "--data", "fashion-mnist", "--out", str(folder), *few)
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "0000002", checkpoints / "0000001")
    best = json.loads((checkpoints / "best.json").read_text())
    (checkpoints / "best.json").write_text(json.dumps({**best, "step": 1}))


def main() -> None:
    prepare()
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        make_run(run)
        model = load_model(run)
        batches = list(ValidationImages(PROTOCOL, MachineConfig(), CPU, 0, 1).batches())
        context = partial(autocast, CPU, DTYPES[pick_precision("auto", CPU)[0]])

        def forward() -> float:
            start = time.perf_counter()
            measure_accuracy({"model": model}, batches, CPU, context)
            return time.perf_counter() - start

        forward()
        together, separate, forwards = [spiralrope("eval", str(run), "--all")], [], []
        for best, ratio, ema in product(("--best", ""), ("0.875", "1.0"), ("--ema", "--no-ema")):
            words = [word for word in (best, ema, "--crop-ratio", ratio) if word]
            separate.append(spiralrope("eval", str(run), *words))
            forwards.append(forward())
        together.append(spiralrope("eval", str(run), "--all"))
    startup = median([call - f for call, f in zip(separate, forwards, strict=True)])
    whole, bound = median(together), startup + sum(forwards)
    show(
        "eval --all",
        [
            ("one start-up", f"{startup:.1f} s"),
            ("eight forward passes", f"{sum(forwards):.1f} s"),
            ("eval --all", f"{whole:.1f} s"),
            ("eight eval calls", f"{sum(separate):.1f} s"),
            ("--all : start-up + eight forward passes", f"{whole / bound:.2f}"),
            ("--all : eight calls", f"{whole / sum(separate):.2f}"),
        ],
    )


if __name__ == "__main__":
    main()
