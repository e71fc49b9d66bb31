"""Does `eval` read what it does not need? Peak memory of whole processes.

Files in the published layout: DeiT-B (or another, by argument) with optimizer
tensors of eight times its weights, and a tiny one, whose evaluation is the constant.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from interleave import show

from spiralrope_cli import RopeConfig, create_model

MIB = 2**20


def write(path: Path, arch: str, times: int) -> int:
    """A published file with random weights; the bytes of one set of them."""
    rope = RopeConfig(scaling="extrapolate")
    state = create_model(arch, rope=rope, num_classes=10, image_size=32).state_dict()
    size = sum(value.numel() * value.element_size() for value in state.values())
    args = argparse.Namespace(rotate=2, truncate_percentage=0.0, max_freq_lang=1.5)
    moments = {number: {"exp_avg": torch.rand(size // 4)} for number in range(times)}
    ema = {name: value.clone() for name, value in state.items()}
    optimizer = {"state": moments, "param_groups": []}
    content = {"model": state, "model_ema": ema, "optimizer": optimizer, "epoch": 1, "args": args}
    torch.save(content, path)
    return size


def peak(path: Path, *words: str) -> float:
    """Peak resident memory of `spiralrope eval FILE`, in bytes."""
    command = [sys.executable, "-m", "spiralrope_cli", "eval", str(path), *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


def main(arch: str = "deit-b") -> None:
    with tempfile.TemporaryDirectory() as place:
        large, small = Path(place) / "large.pth", Path(place) / "small.pth"
        # A child starts with the peak of the process that starts it, so that another one writes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            weights = other.submit(write, large, arch, 8).result()
            other.submit(write, small, "deit-64x2x2", 8).result()
        constant = peak(small)
        rows = [
            ("weights", f"{weights / MIB:.0f} MiB"),
            ("file", f"{large.stat().st_size / MIB:.0f} MiB"),
            ("eval, tiny file", f"{constant / MIB:.0f} MiB"),
        ]
        for words in ((), ("--ema",), ("--all",)):
            used = peak(large, *words)
            name = " ".join(("eval", *words))
            more = (used - constant) / weights
            rows.append((name, f"{used / MIB:.0f} MiB: the constant + {more:.2f} x the weights"))
    show("memory of eval", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
