"""Train steps on one GPU in bf16: eager and with compiled blocks, RoPE on and off, beside timm.

    python benchmarks/gpu.py [--device cuda] [--batch N]

About two minutes on an H200; --device cpu --batch 1 shows that the script works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from interleave import show
from torch import nn

from spiralrope_cli import GaussianDiffusion, RopeConfig, create_model
from spiralrope_cli.core.models.factory import compile_blocks

OFF = RopeConfig(enabled=False)
PEER = "vit_small_patch16_rope_ape_224"
CALLS, ROUNDS, WARMUP = 3, 5, 3
DITS = {"dit-s2": 256, "dit-xl2": 64}
Call = Callable[[], None]


def train_step(model: nn.Module, loss: Callable[[], torch.Tensor], device: torch.device) -> Call:
    """Forward, backward and AdamW, as a call that does not wait for the device."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            mean = loss()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def classifier(model: nn.Module, device: torch.device, batch: int) -> Call:
    """A train step on one fixed batch of 224 px."""
    model = model.to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    return train_step(model, lambda: F.cross_entropy(model(images).float(), labels), device)


def denoiser(model: nn.Module, device: torch.device, batch: int) -> Call:
    """A train step on one fixed batch of 32x32 latents."""
    model, diffusion = model.to(device), GaussianDiffusion()
    x, noise = torch.randn(2, batch, 4, 32, 32, device=device)
    t, y = torch.randint(0, 1000, (2, batch), device=device)
    return train_step(
        model, lambda: diffusion.training_losses(model, x, t, noise, y=y)["loss"].mean(), device
    )


def compiled(model: nn.Module) -> nn.Module:
    compile_blocks(model)
    return model


def milliseconds(call: Call, device: torch.device) -> float:
    """Of one call, the mean of some; waits for the device before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / CALLS


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def report(title: str, sides: dict[str, Call], device: torch.device, batch: int) -> None:
    """Times the sides in turn, and prints the median of each with its ratio to the first."""
    for call in sides.values():
        for _ in range(WARMUP):
            call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, call in sides.items():
            times[name].append(milliseconds(call, device))
    medians = {name: statistics.median(each) for name, each in times.items()}
    first = next(iter(medians.values()))
    rows = [
        (name, f"{ms:8.2f} ms  {1e3 * batch / ms:8.0f} images/s  {ms / first:.3f} × the first")
        for name, ms in medians.items()
    ]
    show(f"{title}, batch {batch}, bf16", rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, help="for all, in place of 256 (DiT-XL/2: 64)")
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_float32_matmul_precision("high")  # as `pretrain` and `dit-train` have it
    torch.backends.cudnn.benchmark = True
    batch = given.batch or 256
    sides = {
        "eager": classifier(create_model("deit-s"), device, batch),
        "eager, RoPE off": classifier(create_model("deit-s", rope=OFF), device, batch),
        "blocks compiled": classifier(compiled(create_model("deit-s")), device, batch),
        "blocks compiled, RoPE off": classifier(
            compiled(create_model("deit-s", rope=OFF)), device, batch
        ),
        f"timm {PEER}, eager": classifier(timm.create_model(PEER), device, batch),
        f"timm {PEER}, blocks compiled": classifier(
            compiled(timm.create_model(PEER)), device, batch
        ),
    }
    report("DeiT-S, train step", sides, device, batch)
    for arch, usual in DITS.items():
        del sides  # the memory of one network at a time
        batch = given.batch or usual
        sides = {
            "eager": denoiser(create_model(arch), device, batch),
            "blocks compiled": denoiser(compiled(create_model(arch)), device, batch),
            "blocks compiled, RoPE off": denoiser(
                compiled(create_model(arch, rope=OFF)), device, batch
            ),
        }
        report(f"{arch}, train step", sides, device, batch)


if __name__ == "__main__":
    main()
