"""How long and how large are Precision and Recall of 50,000 samples against 10,000 images?"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from interleave import prepare, show

from spiralrope_cli.core.metrics.scores import precision_recall

NUM_FEATURES = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    options = parser.parse_args()
    prepare()
    samples, reference = (
        torch.rand(count, NUM_FEATURES) for count in (options.samples, options.reference)
    )
    wall, cpu = time.perf_counter(), time.process_time()
    precision, recall = precision_recall(samples, reference)
    seconds = time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    show(
        f"{options.samples} x {options.reference} random features of {NUM_FEATURES} numbers",
        [
            ("time", f"{seconds:.1f} s"),
            ("time of all cores", f"{time.process_time() - cpu:.1f} s"),
            ("peak memory", f"{peak:.2f} GB"),
            ("precision, recall", f"{precision:.4f}, {recall:.4f}"),
        ],
    )


if __name__ == "__main__":
    main()
