"""Batches of images to features, on a CPU by several threads."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch import nn

from spiralrope_cli.core.data.images import ImageBatch
from spiralrope_cli.core.metrics.features import in_features


class Slow(nn.Module):
    """A network of many stages that is slow for every batch but the first."""

    def __init__(self):
        super().__init__()
        self.stem, self.stages = nn.Identity(), nn.ModuleDict({"a": nn.Identity()})
        self.finished = []

    def forward(self, groups, wanted):
        [number] = groups[0].flatten().tolist()
        for _ in range(4000 if number else 1):
            self.stages["a"](self.stem(groups[0]))
            time.sleep(0.001 if number else 0)
        self.finished.append(number)
        return {}


def test_an_end_does_not_wait_for_the_rest_of_a_batch():
    network, ctx = Slow(), SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    batches = (ImageBatch([number], [torch.full((1, 1), number)]) for number in range(100))
    measured = in_features(batches, network, ("fid",), ctx)
    assert next(measured)[0].numbers == [0]
    measured.close()
    assert network.finished == [0]
    assert not network.stem._forward_pre_hooks, "the next batches are computed in full"
