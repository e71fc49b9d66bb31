"""Steps on one GPU: eager and with compiled blocks, RoPE on and off, beside timm and diffusers.

    python benchmarks/gpu.py [PART ...] [--device cuda] [--batch N] [--no-kernel]

Parts are deit-s, forward, guided, dit-s2, dit-xl2 and precision; by default all of them. Each ends
with the ratios that have a goal. --no-kernel rotates by PyTorch's operators, to see what the Triton
kernel gains. --device cpu --batch 1 shows that the script works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from interleave import show
from torch import nn

from spiralrope_cli import GaussianDiffusion, RopeConfig, create_model
from spiralrope_cli.core import kernels
from spiralrope_cli.core.config.samples import GuidanceConfig
from spiralrope_cli.core.diffusion.samplers import ddpm, guided
from spiralrope_cli.core.models.factory import cast_matmuls, compile_blocks
from spiralrope_cli.core.runtime.device import DTYPES, allow_tf32, autocast, matrix_rate
from spiralrope_cli.core.runtime.seeds import NoisePerImage

OFF = RopeConfig(enabled=False)
ROPE, PLAIN, DEIT3 = (
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
)
CALLS, ROUNDS, WARMUP = 3, 5, 3
GUIDED_STEPS = 10
BATCHES = {
    **{"deit-s": 256, "forward": 256, "guided": 32},
    **{"dit-s2": 256, "dit-xl2": 64, "precision": 256},
}
"""Part -> batch size."""
ON_TO_OFF = [
    ("eager", "eager, RoPE off", 1.05),
    ("blocks compiled", "blocks compiled, RoPE off", 1.03),
]
GOALS = {
    "deit-s": [
        *ON_TO_OFF,
        ("eager", f"timm {DEIT3}, eager", 1.1),
        ("blocks compiled", f"timm {ROPE}, blocks compiled", 1.0),
        ("blocks compiled", f"timm {PLAIN}, blocks compiled", 1.1),
    ],
    "forward": [(ours, peer, 1.05) for ours, peer, _ in ON_TO_OFF],
    "guided": [("blocks compiled", "diffusers, network alone", 1 / 1.25)],
    "dit-s2": ON_TO_OFF,
    "dit-xl2": ON_TO_OFF,
}
"""Part -> (side, side to compare with, largest ratio of their times)."""
Call = Callable[[], None]


def train_step(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    device: torch.device,
    precision: str = "bf16",
) -> Call:
    """Forward, backward and AdamW, as a call that does not wait for the device."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        if device.type == "cuda":
            allow_tf32(precision != "fp32")
        with autocast(device, DTYPES[precision]):
            mean = loss()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def classifier(model: nn.Module, device: torch.device, batch: int, precision: str = "bf16") -> Call:
    """A train step on one fixed batch of 224 px."""
    model = model.to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    return train_step(
        model, lambda: F.cross_entropy(model(images).float(), labels), device, precision
    )


def forward(model: nn.Module, device: torch.device, images: torch.Tensor) -> Call:
    """Inference on one fixed batch, as `eval` does it in bf16."""
    model = model.to(device).eval()
    cast_matmuls(model, torch.bfloat16)
    return torch.inference_mode()(lambda: model(images))


def sampler(model: nn.Module, device: torch.device, batch: int) -> Call:
    """Guided sampling of some images, as `dit-sample` does it in bf16, without the VAE."""
    model, diffusion = model.to(device).eval(), GaussianDiffusion(str(GUIDED_STEPS))
    cast_matmuls(model, torch.bfloat16)
    labels, guidance = torch.arange(batch, device=device), GuidanceConfig(cfg_scale=4.0)

    @torch.inference_mode()
    def call() -> None:
        noise = NoisePerImage(0, range(batch), (4, 32, 32), device)
        for _ in ddpm(diffusion, guided(model, labels, guidance), noise.draw(), noise.draw):
            pass

    return call


def diffusers_network(device: torch.device, batch: int) -> Call:
    """The passes of diffusers' DiT-XL/2 in bf16 that guided sampling takes, without its sampler."""
    sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
    model = DiTTransformer2DModel(**sizes, out_channels=8).to(device, torch.bfloat16).eval()
    x = torch.randn(2 * batch, 4, 32, 32, device=device, dtype=torch.bfloat16)
    t, labels = torch.full((2 * batch,), 500, device=device), torch.arange(2 * batch, device=device)

    @torch.inference_mode()
    def call() -> None:
        for _ in range(GUIDED_STEPS):
            model(x, timestep=t, class_labels=labels)

    return call


def denoiser(model: nn.Module, device: torch.device, batch: int) -> Call:
    """A train step on one fixed batch of 32x32 latents."""
    model, diffusion = model.to(device), GaussianDiffusion()
    x, noise = torch.randn(2, batch, 4, 32, 32, device=device)
    t, y = torch.randint(0, 1000, (2, batch), device=device)
    return train_step(
        model, lambda: diffusion.training_losses(model, x, t, noise, y=y)["loss"].mean(), device
    )


def compiled(model: nn.Module) -> nn.Module:
    compile_blocks(model, say=lambda line: None)
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


def median_ratio(ours: list[float], peer: list[float]) -> float:
    """Of the times, round by round."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def report(part: str, title: str, sides: dict[str, Call], device: torch.device, batch: int) -> None:
    """Times the sides in turn; prints the median of each, and the ratios that have a goal."""
    first_calls = {}
    for name, call in sides.items():
        start = time.perf_counter()
        for _ in range(WARMUP):
            call()
        synchronize(device)
        first_calls[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, call in sides.items():
            times[name].append(milliseconds(call, device))
    medians = {name: statistics.median(each) for name, each in times.items()}
    first = next(iter(medians.values()))
    rows = [
        (
            name,
            f"{ms:8.2f} ms  {1e3 * batch / ms:8.0f} images/s  {ms / first:.3f} × the first, "
            f"first {WARMUP} calls {first_calls[name]:.1f} s",
        )
        for name, ms in medians.items()
    ]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append(("memory of all sides together", f"{peak:8.1f} GiB"))
        torch.cuda.reset_peak_memory_stats()
    for ours, peer, most in GOALS.get(part, []):
        value = median_ratio(times[ours], times[peer])
        rows.append((f"RATIO {ours} / {peer}", f"{value:8.3f}, goal at most {most:g}"))
    show(f"{title}, batch {batch}", rows)


def sides_of(part: str, device: torch.device, batch: int) -> tuple[str, dict[str, Call]]:
    """Title and sides of a part; the memory of one part at a time."""
    if part == "deit-s":
        return "DeiT-S, train step, bf16", {
            "eager": classifier(create_model("deit-s"), device, batch),
            "eager, RoPE off": classifier(create_model("deit-s", rope=OFF), device, batch),
            "blocks compiled": classifier(compiled(create_model("deit-s")), device, batch),
            "blocks compiled, RoPE off": classifier(
                compiled(create_model("deit-s", rope=OFF)), device, batch
            ),
            **{
                f"timm {name}, eager": classifier(timm.create_model(name), device, batch)
                for name in (ROPE, PLAIN, DEIT3)
            },
            **{
                f"timm {name}, blocks compiled": classifier(
                    compiled(timm.create_model(name)), device, batch
                )
                for name in (ROPE, PLAIN)
            },
        }
    if part == "precision":
        return "DeiT-S, train step, blocks compiled", {
            name: classifier(compiled(create_model("deit-s")), device, batch, name)
            for name in ("bf16", "tf32", "fp32")
        }
    if part == "forward":
        images = torch.randn(batch, 3, 224, 224, device=device)
        return "DeiT-S, forward, bf16", {
            "eager": forward(create_model("deit-s"), device, images),
            "eager, RoPE off": forward(create_model("deit-s", rope=OFF), device, images),
            "blocks compiled": forward(compiled(create_model("deit-s")), device, images),
            "blocks compiled, RoPE off": forward(
                compiled(create_model("deit-s", rope=OFF)), device, images
            ),
        }
    if part == "guided":
        return f"DiT-XL/2, guided sampling of {GUIDED_STEPS} steps, bf16", {
            "eager": sampler(create_model("dit-xl2"), device, batch),
            "blocks compiled": sampler(compiled(create_model("dit-xl2")), device, batch),
            "diffusers, network alone": diffusers_network(device, batch),
        }
    return f"{part}, train step, bf16", {
        "eager": denoiser(create_model(part), device, batch),
        "eager, RoPE off": denoiser(create_model(part, rope=OFF), device, batch),
        "blocks compiled": denoiser(compiled(create_model(part)), device, batch),
        "blocks compiled, RoPE off": denoiser(
            compiled(create_model(part, rope=OFF)), device, batch
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[*BATCHES, []], metavar="PART")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, help="for all, in place of 256 (DiT-XL/2: 64, 32)")
    parser.add_argument("--no-kernel", action="store_true", help="rotate by PyTorch's operators")
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.no_kernel:
        kernels.TRITON_DEVICE = ""
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
        allow_tf32(True)  # as in bf16 runs
    torch.backends.cudnn.benchmark = True
    for dtype in (torch.bfloat16, torch.float32):
        print(f"matrix rate, {dtype}: {matrix_rate(device, dtype) / 1e12:.1f} TFLOP/s")
    for part in given.parts or BATCHES:
        batch = given.batch or BATCHES[part]
        title, sides = sides_of(part, device, batch)
        report(part, title, sides, device, batch)
        del sides


if __name__ == "__main__":
    main()
