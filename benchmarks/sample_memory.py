"""Does writing 20 000 images of 256 px take memory? Peak of `spiralrope dit-sample`, as a process.

A tiny transformer with random weights draws them in pixel space, in two steps. The idle process is
the same command for one batch: it loads and draws as much at a time, and has little to keep.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from interleave import show

from spiralrope_cli import RopeConfig, create_model

MIB = 2**20
NUM, BATCH, SIZE, ARCH = 20_000, 64, 256, "dit-64x1x1-64"


def write_weights(path: Path) -> None:
    """Random weights, as a bare state dict."""
    rope = RopeConfig(enabled=False)
    model = create_model(ARCH, rope=rope, input_size=SIZE, in_chans=3, num_classes=10)
    torch.save(model.state_dict(), path)


def sample(weights: Path, num: int, out: Path) -> tuple[float, float]:
    """(peak resident memory in bytes, seconds) of `spiralrope dit-sample`."""
    words = [str(weights), "--vae", "none", "--num-samples", str(num), "--num-sampling-steps", "2"]
    words += ["--batch-size", str(BATCH), "--out", str(out)]
    command = [sys.executable, "-m", "spiralrope_cli", "dit-sample", *words]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"it failed: {' '.join(command)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # A child starts with the peak of the process that starts it, so that another one writes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            other.submit(write_weights, folder / "weights.pt").result()
        idle, _ = sample(folder / "weights.pt", BATCH, folder / "idle")
        peak, seconds = sample(folder / "weights.pt", NUM, folder / "many")
        size = (folder / "many" / "samples.npz").stat().st_size
    rows = [
        ("images", f"{NUM} of {SIZE} px, {size / MIB:.0f} MiB, in {seconds:.0f} s"),
        (f"peak for {BATCH}", f"{idle / MIB:.0f} MiB"),
        (f"peak for {NUM}", f"{peak / MIB:.0f} MiB"),
        ("more", f"{(peak - idle) / MIB:.0f} MiB"),
    ]
    show("memory of dit-sample", rows)


if __name__ == "__main__":
    main()
