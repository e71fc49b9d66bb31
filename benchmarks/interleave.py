"""Times several things in turn, A B C A B C ..., so that drift of the machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from spiralrope_cli import GaussianDiffusion
from spiralrope_cli.core.runtime.device import autocast, keep_freed_memory

CPU = torch.device("cpu")
Call = Callable[[], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def interleaved(
    sides: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every counted call, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, call in sides.items():
            start = clock()
            call()
            if number >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """Median of the ratios ours / peer, round by round."""
    return median([a / b for a, b in zip(seconds[ours], seconds[peer], strict=True)])


def prepare() -> None:
    """The settings that every run of ours makes, for all sides alike."""
    keep_freed_memory()
    torch.manual_seed(0)


def train_step(model: nn.Module, dtype: str, loss: Callable[[], torch.Tensor]) -> Call:
    """Forward, backward and AdamW on a model's loss, as a call."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with autocast(CPU, DTYPES[dtype]):
            mean = loss()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deit_step(model: nn.Module, dtype: str, batch: int, size: int = 224) -> Call:
    """A classifier's train step on one fixed batch, as a call."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    return train_step(model, dtype, lambda: F.cross_entropy(model(images).float(), labels))


def dit_step(model: nn.Module, dtype: str, batch: int, size: int = 32) -> Call:
    """A DiT's train step on one fixed batch of latents, as a call."""
    latents, noise = torch.randn(2, batch, 4, size, size)
    t, labels = torch.randint(0, 1000, (2, batch))
    losses = partial(GaussianDiffusion().training_losses, model, latents, t, noise, y=labels)
    return train_step(model, dtype, lambda: losses()["loss"].mean())


def forward(model: nn.Module, dtype: str, *args: object, **kwargs: object) -> Call:
    """Inference on one fixed batch, as a call."""
    model.eval()

    @torch.inference_mode()
    def call() -> None:
        with autocast(CPU, DTYPES[dtype]):
            model(*args, **kwargs)

    return call


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """A small table on stdout."""
    print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
