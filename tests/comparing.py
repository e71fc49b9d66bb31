"""How tests compare what runs leave behind."""

from __future__ import annotations

import json

import torch


def same_tensors(one, other):
    """Whether two nested structures of tensors and numbers are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tensors(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(
            same_tensors(a, b) for a, b in zip(one, other, strict=True)
        )
    return one == other


def relative_distance(one, other):
    """L2 distance of two dicts of tensors over the length of the second."""
    off = sum((one[name] - other[name]).double().square().sum() for name in other) ** 0.5
    return (off / sum(other[name].double().square().sum() for name in other) ** 0.5).item()


def read_pointer(folder, name):
    """What `best.json` or `last.json` of a run says."""
    return json.loads((folder / "checkpoints" / f"{name}.json").read_text())
