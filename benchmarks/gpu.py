"""Train steps, forward passes, features of fid, VAE and whole runs on one GPU, beside other code.

    python benchmarks/gpu.py [PART ...] [--device cuda] [--batch N] [--no-kernel] [--inception FILE]

Without parts all of them, one after the other; choose some where time is short. Each prints its
table at once, and where one fails the others go on. Where a ratio has a goal, it stands beside it.
--no-kernel rotates by PyTorch's operators, to see what the Triton kernel gains.
`--tiny --device cpu` shows that a part works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.utils import logging
from interleave import show
from latents import WIDTHS, random_cache, random_vae
from PIL import Image
from random_inception import write_random_weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from spiralrope_cli import GaussianDiffusion, RopeConfig, create_model
from spiralrope_cli.core import kernels
from spiralrope_cli.core.config.fid import FidRun
from spiralrope_cli.core.config.samples import GuidanceConfig
from spiralrope_cli.core.data.image_sets import inspect_side
from spiralrope_cli.core.data.memory import load_digits
from spiralrope_cli.core.diffusion.samplers import ddpm, guided
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.metrics.features import measure_side
from spiralrope_cli.core.metrics.inception import build_extractor
from spiralrope_cli.core.metrics.scores import Moments, frechet_distance
from spiralrope_cli.core.models.factory import cast_matmuls, compile_blocks
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.device import DTYPES, allow_tf32, autocast, matrix_rate
from spiralrope_cli.core.runtime.distributed import DistContext, StopRequest
from spiralrope_cli.core.runtime.progress import read_metrics
from spiralrope_cli.core.runtime.seeds import NoisePerImage

OFF = RopeConfig(enabled=False)
ROPE, PLAIN, DEIT3 = (
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
)
ON_TO_OFF = [
    ("eager", "eager, RoPE off", 1.05),
    ("blocks compiled", "blocks compiled, RoPE off", 1.03),
]
"""Side, side to compare with, goal: the largest ratio of their times."""
TINY_TIMM = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32}
Call = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Where, how large and how often."""

    device: torch.device
    tiny: bool
    batch: int  # 0: that of each part
    inception: str
    rates: dict[torch.dtype, float]

    def size(self, usual: int) -> int:
        """Batch size of a part."""
        return self.batch or (2 if self.tiny else usual)

    @property
    def sampling_steps(self) -> int:
        """Of guided sampling."""
        return 2 if self.tiny else 10

    @property
    def side(self) -> int:
        """Of an image in pixels."""
        return 32 if self.tiny else 224

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def memory(self) -> tuple[float, float]:
        """GiB that are allocated now, and at most since the last call."""
        if self.device.type != "cuda":
            return 0.0, 0.0
        found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found[0] / 2**30, found[1] / 2**30


# --- Networks and calls


def ours(bench: Bench, arch: str, **options: Any) -> nn.Module:
    """One of our networks on the device; all of them are small in a tiny run."""
    if bench.tiny:
        arch = "dit-64x2x2-2" if arch.startswith("dit") else "deit-64x2x2"
        if arch.startswith("deit"):
            options = {"image_size": bench.side, **options}
    with bench.device:  # random weights of DiT-XL/2 take seconds on a CPU
        return create_model(arch, **options)


def timms(bench: Bench, name: str) -> nn.Module:
    """One of timm's networks on the device."""
    return timm.create_model(name, **(TINY_TIMM if bench.tiny else {})).to(bench.device)


def compiled(bench: Bench, model: nn.Module) -> nn.Module:
    """The network with compiled blocks; not in a tiny run, where the wait would be most of it."""
    if not bench.tiny:
        compile_blocks(model, say=lambda line: None)
    return model


def train_step(
    bench: Bench, model: nn.Module, loss: Callable[[], Tensor], precision: str = "bf16"
) -> Call:
    """Forward, backward and AdamW, as a call that does not wait for the device."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        allow_tf32(precision != "fp32")
        with autocast(bench.device, DTYPES[precision]):
            mean = loss()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def classifier(bench: Bench, model: nn.Module, batch: int, precision: str = "bf16") -> Call:
    """A train step on one fixed batch."""
    images = torch.randn(batch, 3, bench.side, bench.side, device=bench.device)
    labels = torch.randint(0, 1000, (batch,), device=bench.device)
    return train_step(
        bench, model, lambda: F.cross_entropy(model(images).float(), labels), precision
    )


def denoiser(bench: Bench, model: nn.Module, batch: int) -> Call:
    """A train step on one fixed batch of 32x32 latents."""
    diffusion = GaussianDiffusion()
    x, noise = torch.randn(2, batch, 4, 32, 32, device=bench.device)
    t, y = torch.randint(0, 1000, (2, batch), device=bench.device)
    return train_step(
        bench, model, lambda: diffusion.training_losses(model, x, t, noise, y=y)["loss"].mean()
    )


def forward(model: nn.Module, images: Tensor) -> Call:
    """Inference on one fixed batch, as `eval` does it in bf16."""
    cast_matmuls(model.eval(), torch.bfloat16)
    return torch.inference_mode()(lambda: model(images))


def sampler(bench: Bench, model: nn.Module, batch: int) -> Call:
    """Guided sampling of some images, as `dit-sample` does it in bf16, without the VAE."""
    diffusion = GaussianDiffusion(str(bench.sampling_steps))
    cast_matmuls(model.eval(), torch.bfloat16)
    labels, guidance = torch.arange(batch, device=bench.device), GuidanceConfig(cfg_scale=4.0)

    @torch.inference_mode()
    def call() -> None:
        noise = NoisePerImage(0, range(batch), (4, 32, 32), bench.device)
        for _ in ddpm(diffusion, guided(model, labels, guidance), noise.draw(), noise.draw):
            pass

    return call


def diffusers_network(bench: Bench, batch: int) -> Call:
    """The passes of diffusers' DiT-XL/2 in bf16 that guided sampling takes, without its sampler."""
    sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
    if bench.tiny:
        sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
    with bench.device:
        model = DiTTransformer2DModel(**sizes, out_channels=8).to(torch.bfloat16).eval()
    x = torch.randn(2 * batch, 4, 32, 32, device=bench.device, dtype=torch.bfloat16)
    t, labels = torch.full((2 * batch,), 500), torch.arange(2 * batch)
    t, labels = t.to(bench.device), labels.to(bench.device)

    @torch.inference_mode()
    def call() -> None:
        for _ in range(bench.sampling_steps):
            model(x, timestep=t, class_labels=labels)

    return call


# --- Time, memory and share


def report(
    bench: Bench,
    title: str,
    sides: dict[str, Call],
    batch: int,
    goals: Iterable[tuple[str, str, float]] = (),
    calls: int = 3,
) -> dict[str, float]:
    """Times the sides in turn, prints a table, and returns the median milliseconds of each.

    Each round waits for the device after some calls; one call is enough where it takes long.

    The share of the matrix rate in bf16 counts the operations of the first side.
    """
    calls, rounds, warmup = (1, 1, 1) if bench.tiny else (calls, 4, 3)
    gc.collect()
    first, peaks, times = {}, {}, {name: [] for name in sides}
    for name, call in sides.items():
        resting, _ = bench.memory()
        start = time.perf_counter()
        for _ in range(warmup):
            call()
        bench.synchronize()
        first[name] = time.perf_counter() - start
        peaks[name] = bench.memory()[1] - resting
    for _ in range(rounds):
        for name, call in sides.items():
            bench.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            bench.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    medians = {name: statistics.median(each) for name, each in times.items()}
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        next(iter(sides.values()))()
    flops = counter.get_total_flops()
    fastest = next(iter(medians.values()))
    rows = [
        (
            name,
            f"{ms:8.2f} ms {1e3 * batch / ms:8.0f} images/s {ms / fastest:6.3f} × the first, "
            f"{1e3 * flops / ms / bench.rates[torch.bfloat16]:4.0%} of the matrix rate, "
            f"{peaks[name]:5.2f} GiB, first {warmup} calls {first[name]:.1f} s",
        )
        for name, ms in medians.items()
    ]
    for one, other, most in goals:
        ratio = statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
        rows.append((f"RATIO {one} / {other}", f"{ratio:8.3f}, goal at most {most:g}"))
    show(f"{title}, batch {batch}", rows)
    return medians


# --- Parts


def deit(bench: Bench) -> None:
    """Train step of DeiT-S beside timm's networks."""
    batch = bench.size(256)
    sides = {
        "eager": classifier(bench, ours(bench, "deit-s"), batch),
        "eager, RoPE off": classifier(bench, ours(bench, "deit-s", rope=OFF), batch),
        "blocks compiled": classifier(bench, compiled(bench, ours(bench, "deit-s")), batch),
        "blocks compiled, RoPE off": classifier(
            bench, compiled(bench, ours(bench, "deit-s", rope=OFF)), batch
        ),
        **{
            f"timm {name}, eager": classifier(bench, timms(bench, name), batch)
            for name in (ROPE, PLAIN, DEIT3)
        },
        **{
            f"timm {name}, blocks compiled": classifier(
                bench, compiled(bench, timms(bench, name)), batch
            )
            for name in (ROPE, PLAIN)
        },
    }
    goals = [
        *ON_TO_OFF,
        ("eager", f"timm {DEIT3}, eager", 1.1),
        ("blocks compiled", f"timm {ROPE}, blocks compiled", 1.0),
        ("blocks compiled", f"timm {PLAIN}, blocks compiled", 1.1),
    ]
    report(bench, "DeiT-S, train step, bf16", sides, batch, goals)


def inference(bench: Bench) -> None:
    """Inference of DeiT-S."""
    batch = bench.size(256)
    images = torch.randn(batch, 3, bench.side, bench.side, device=bench.device)
    sides = {
        "eager": forward(ours(bench, "deit-s"), images),
        "eager, RoPE off": forward(ours(bench, "deit-s", rope=OFF), images),
        "blocks compiled": forward(compiled(bench, ours(bench, "deit-s")), images),
        "blocks compiled, RoPE off": forward(
            compiled(bench, ours(bench, "deit-s", rope=OFF)), images
        ),
    }
    goals = [(one, other, 1.05) for one, other, _ in ON_TO_OFF]
    report(bench, "DeiT-S, forward, bf16", sides, batch, goals)


def sampling(bench: Bench) -> None:
    """Guided sampling by DiT-XL/2 beside diffusers' network."""
    batch = bench.size(32)
    sides = {
        "eager": sampler(bench, ours(bench, "dit-xl2"), batch),
        "blocks compiled": sampler(bench, compiled(bench, ours(bench, "dit-xl2")), batch),
        "diffusers, network alone": diffusers_network(bench, batch),
    }
    goals = [("blocks compiled", "diffusers, network alone", 1 / 1.25)]
    title = f"DiT-XL/2, guided sampling of {bench.sampling_steps} steps, bf16"
    report(bench, title, sides, batch, goals, calls=1)


def dit(bench: Bench, arch: str, usual: int) -> None:
    """Train step of a DiT."""
    batch = bench.size(usual)
    sides = {
        "eager": denoiser(bench, ours(bench, arch), batch),
        "eager, RoPE off": denoiser(bench, ours(bench, arch, rope=OFF), batch),
        "blocks compiled": denoiser(bench, compiled(bench, ours(bench, arch)), batch),
        "blocks compiled, RoPE off": denoiser(
            bench, compiled(bench, ours(bench, arch, rope=OFF)), batch
        ),
    }
    report(bench, f"{arch}, train step, bf16", sides, batch, ON_TO_OFF)


def precision(bench: Bench) -> None:
    """Train step of DeiT-S in each precision."""
    batch = bench.size(256)
    sides = {
        name: classifier(bench, compiled(bench, ours(bench, "deit-s")), batch, name)
        for name in ("bf16", "tf32", "fp32")
    }
    report(bench, "DeiT-S, train step, blocks compiled", sides, batch)


def vae(bench: Bench) -> None:
    """The VAE of published size, with random weights, at 256 px."""
    batch, pixels = bench.size(32), 64 if bench.tiny else 256
    images = torch.randn(batch, 3, pixels, pixels, device=bench.device)
    latents = torch.randn(batch, 4, pixels // 8, pixels // 8, device=bench.device)

    def side(what: str, setting: str, inputs: Tensor) -> Call:
        network = random_vae((32,) * 4 if bench.tiny else WIDTHS)
        network.model.to(bench.device, DTYPES[setting], memory_format=torch.channels_last)

        def call() -> None:
            allow_tf32(setting != "fp32")
            getattr(network, what)(inputs)

        return call

    for what, inputs in (("encode", images), ("decode", latents)):
        sides = {setting: side(what, setting, inputs) for setting in ("tf32", "fp32", "bf16")}
        report(bench, f"VAE, {what}", sides, batch)


@contextlib.contextmanager
def inception_file(bench: Bench) -> Iterator[Path]:
    """The weights that were given, or random ones that are alive on digits."""
    if bench.inception:
        yield Path(bench.inception)
        return
    with tempfile.TemporaryDirectory() as folder:
        digits = load_digits()[1].images[:32].mul(15).to(torch.uint8).expand(-1, 3, -1, -1)
        yield write_random_weights(Path(folder) / "random.pth", digits)


def pictures(count: int, seed: int) -> Tensor:
    """[count, 3, 256, 256] uint8 with structure: enlarged digits in random colours."""
    draw = torch.Generator().manual_seed(seed)
    digits = load_digits()[0].images.float() / 16
    chosen = digits[torch.randint(len(digits), (count,), generator=draw)]
    colours = torch.rand(count, 3, 1, 1, generator=draw) * 255
    large = F.interpolate(chosen, size=(256, 256), mode="bilinear")
    return (large * colours).to(torch.uint8)


def fid(bench: Bench) -> None:
    """Features of fid beside torch-fidelity's, by precision and memory format; and FID by each."""
    batch, count = bench.size(256), 2 if bench.tiny else 2048
    sets = [pictures(count, seed).to(bench.device) for seed in (0, 1)]
    images = sets[0][:batch]
    with inception_file(bench) as file:
        weights = torch.load(file, weights_only=True)
        theirs = FeatureExtractorInceptionV3("inception", ["2048"], str(file)).to(bench.device)
    formats = {"NHWC": False, "NCHW": True}
    networks = {
        name: build_extractor(weights, file, planes=planes).to(bench.device)
        for name, planes in formats.items()
    }

    def features(x: Tensor, name: str, setting: str) -> Tensor:
        allow_tf32(setting == "tf32")
        with torch.inference_mode(), autocast(bench.device, DTYPES[setting]):
            if name == "torch-fidelity":
                return theirs(x)[0]
            return networks[name]([x], ["pool"])["pool"]

    def distance(name: str, setting: str) -> float:
        moments = []
        for each in sets:
            moments.append(Moments(2048, bench.device))
            for part in each.split(batch):
                moments[-1].add(features(part, name, setting))
        allow_tf32(False)
        statistics = [part for each in moments for part in (each.mean, each.covariance())]
        return frechet_distance(*statistics)

    kinds = [("torch-fidelity", "fp32"), ("torch-fidelity", "tf32")]
    kinds += [(name, setting) for setting in ("fp32", "tf32", "bf16") for name in formats]
    kinds = [kind for kind in kinds if not bench.tiny or kind[1] == "fp32"]
    sides = {
        f"{name}, {setting}": lambda name=name, setting=setting: features(images, name, setting)
        for name, setting in kinds
    }
    report(bench, "Inception features of 256 px", sides, batch)
    exact = distance(*kinds[0])
    rows = [(f"{name}, {setting}", distance(name, setting)) for name, setting in kinds]
    show(
        f"FID of {count} enlarged digits against {count} others",
        [(name, f"{value:.6f}, {abs(value / exact - 1):.0e} apart") for name, value in rows],
    )


def fid_files(bench: Bench) -> None:
    """`fid` of a folder of PNG files beside its features alone."""
    copies, kinds = (1, 8) if bench.tiny else (32, 128)
    count, batch = copies * kinds, FidRun.batch_size
    ctx = DistContext(0, 1, bench.device, "fp32", "", StopRequest())
    with inception_file(bench) as file, tempfile.TemporaryDirectory() as folder:
        weights, planes = torch.load(file, weights_only=True), bench.device.type == "cuda"
        network = build_extractor(weights, file, planes=planes).to(bench.device)
        for number, pixels in enumerate(pictures(kinds, 0)):
            path = Path(folder) / f"{number:04}.png"
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
            for copy in range(1, copies):
                path.with_stem(f"{number:04}-{copy}").hardlink_to(path)
        run = FidRun(samples=folder, select=("is",))
        allow_tf32(False)
        side = replace(inspect_side(Path(folder), "SAMPLES"), needed=("fid",))
        seconds = []
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            measure_side(run, ctx, side, lambda: network)
            bench.synchronize()
            seconds.append(time.perf_counter() - start)
        images = pictures(min(batch, count), 0).to(bench.device)

        @torch.inference_mode()
        def bare() -> None:
            network([images], ["pool"])

        medians = report(bench, "features alone", {"fp32": bare}, len(images))
    whole, alone = count / seconds[-1], 1e3 * len(images) / medians["fp32"]
    show(
        f"fid of {count} PNG files of 256 px",
        [("images/s", f"{whole:.0f}"), ("SHARE of the features alone", f"{whole / alone:.2f}")],
    )


def whole_run(bench: Bench, command: str, options: dict[str, Any], batch: int) -> float:
    """Images per second of a training command at its last log points."""
    steps = 3 if bench.tiny else 200
    common: dict[str, Any] = {
        "batch_size": batch,
        "micro_batch_size": batch,
        "max_steps": steps,
        "log_every": max(steps // 4, 1),
        "save_every": 10**6,
        "warmup_epochs": 0,
        "precision": "bf16",
        "compile": "off" if bench.tiny else "on",
        "device": bench.device.type,
        "nproc": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        with contextlib.redirect_stdout(io.StringIO()):
            train.work(resolve(command, {**common, **options, "out": out}).run)
        logged = [line["images_per_s"] for line in read_metrics(Path(out)) if "loss" in line]
    return statistics.median(logged[1:] or logged)


def loop_deit(bench: Bench) -> None:
    """`pretrain` on images in memory, augmented on the device, beside the bare step."""
    batch = bench.size(256)
    model = ours(bench, "deit-s", in_chans=1, num_classes=10)
    images = torch.randn(batch, 1, bench.side, bench.side, device=bench.device)
    labels = torch.randint(0, 10, (batch,), device=bench.device)
    step = train_step(
        bench,
        compiled(bench, model),
        lambda: F.cross_entropy(model(images).float(), labels),
    )
    bare = report(bench, "DeiT-S on grey images, train step", {"bare step": step}, batch)
    options: dict[str, Any] = {
        "arch": "deit-64x2x2" if bench.tiny else "deit-s",
        "image_size": (bench.side, bench.side),
        "patch_size": 16,
        "validate_every": 10**6,
    }
    show_share(
        "pretrain", whole_run(bench, "pretrain", options, batch), 1e3 * batch / bare["bare step"]
    )


def loop_dit(bench: Bench) -> None:
    """`dit-train` from cached latents beside the bare step."""
    batch = bench.size(256)
    step = denoiser(bench, compiled(bench, ours(bench, "dit-s2")), batch)
    bare = report(bench, "DiT-S/2, train step", {"bare step": step}, batch)
    with tempfile.TemporaryDirectory() as folder:
        random_cache(Path(folder), 1024)
        options: dict[str, Any] = {
            "arch": "dit-64x2x2-2" if bench.tiny else "dit-s2",
            "latents": folder,
            "rotate": 2,
            "sample_every": 0,
        }
        show_share(
            "dit-train",
            whole_run(bench, "dit-train", options, batch),
            1e3 * batch / bare["bare step"],
        )


def show_share(command: str, whole: float, bare: float) -> None:
    """Images per second of the command over those of the bare step."""
    rows = [("images/s", f"{whole:.0f}"), ("SHARE of the bare step", f"{whole / bare:.3f}")]
    show(f"{command}, the whole command", rows)


PARTS: dict[str, Callable[[Bench], None]] = {
    "deit-s": deit,
    "forward": inference,
    "dit-s2": lambda bench: dit(bench, "dit-s2", 256),
    "dit-xl2": lambda bench: dit(bench, "dit-xl2", 64),
    "guided": sampling,
    "loop-deit": loop_deit,
    "loop-dit": loop_dit,
    "fid": fid,
    "fid-files": fid_files,
    "vae": vae,
    "precision": precision,
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small networks, one call each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=0, help="for all parts")
    parser.add_argument("--inception", default="", help="weights of fetch inception")
    parser.add_argument("--no-kernel", action="store_true", help="rotate by PyTorch's operators")
    given = parser.parse_args(words)
    if given.no_kernel:
        kernels.TRITON_DEVICE = ""
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    sys.stdout.reconfigure(line_buffering=True)  # a run that is cut off keeps what it has
    device = torch.device(given.device)
    logging.set_verbosity_error()  # it warns of modules that there are not
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.backends.cudnn.benchmark = True
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        allow_tf32(True)
        rates[dtype] = matrix_rate(device, dtype)
        print(f"matrix rate, {name}: {rates[dtype] / 1e12:.1f} TFLOP/s")
    failed = []
    for part in given.parts or PARTS:
        # Else what a part compiles would count towards the limit of the next, or be of any size.
        torch._dynamo.reset()
        start = time.perf_counter()
        try:
            PARTS[part](Bench(device, given.tiny, given.batch, given.inception, rates))
        except Exception:  # noqa: BLE001 - the other parts are measured all the same
            traceback.print_exc()
            failed.append(part)
        print(f"{part}: {time.perf_counter() - start:.0f} s\n")
        gc.collect()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
