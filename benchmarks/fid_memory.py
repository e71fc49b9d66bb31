"""Does the memory of `spiralrope fid` grow with the images? Its peak, as a process of its own.

Fashion-MNIST, enlarged to 256 px: 20 000 training images in an `.npz` against 2 000 of the test,
all metrics, random weights. About 11 minutes on two cores; --images 1000 for a first look.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from interleave import show
from random_inception import write_random_weights
from torch import Tensor

from spiralrope_cli.core.data.memory import load_fashion_mnist

MIB, SIZE, REFERENCE, CALIBRATION = 2**20, 256, 2000, 48


def write_npz(path: Path, images: Tensor) -> None:
    """[N, 1, 28, 28] uint8 as `arr_0` of N images of 256 px, one at a time."""
    rows = np.arange(SIZE) * images.shape[-1] // SIZE
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        head = {"descr": "|u1", "fortran_order": False, "shape": (len(images), SIZE, SIZE, 3)}
        np.lib.format.write_array_header_1_0(out, head)
        for image in images[:, 0].numpy():
            large = image[rows][:, rows, None]
            out.write(np.broadcast_to(large, (SIZE, SIZE, 3)).tobytes())


def prepare(folder: Path, num: int) -> None:
    """Writes both sides and the weights."""
    train, test = (each.images for each in load_fashion_mnist())
    write_random_weights(folder / "random.pth", train[-CALIBRATION:].expand(-1, 3, -1, -1))
    write_npz(folder / "samples.npz", train[:num])
    write_npz(folder / "reference.npz", test[:REFERENCE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000, help="in the samples")
    num = parser.parse_args().images
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # A child starts with the peak of the process that starts it, so that another one writes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            other.submit(prepare, folder, num).result()
        files = [str(folder / name) for name in ("samples.npz", "reference.npz")]
        words = ["fid", *files, "--weights", str(folder / "random.pth"), "--json"]
        start = time.perf_counter()
        command = [sys.executable, "-m", "spiralrope_cli", *words]
        environment = {**os.environ, "SPIRALROPE_CACHE": place}
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        metrics = json.loads(child.stdout.read()) if child.stdout else {}
        _, _, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    rows = [
        ("images", f"{num} and {REFERENCE} of {SIZE} px, in {seconds:.0f} s"),
        ("peak memory", f"{usage.ru_maxrss * 1024 / 1e9:.2f} GB"),
        *((name, f"{metrics[name]:.6g}") for name in ("fid", "is", "kid", "precision", "recall")),
    ]
    show("memory of fid", rows)


if __name__ == "__main__":
    main()
