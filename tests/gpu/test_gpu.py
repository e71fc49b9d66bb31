"""What a GPU must compute: the CPU's numbers within bounds, the same bits twice, no waits.

Skipped without an NVIDIA GPU; `make test-gpu` runs these alone. SPIRALROPE_GPU_TESTS=cpu runs what
a CPU can show of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import (
    MODULATION_SIZES,
    ROTATION_SIZES,
    modulation_formula,
    modulation_inputs,
    relative_distance,
    rotation_formula,
    rotation_inputs,
    rotation_results,
    same_tensors,
)
from safetensors.torch import load_file
from workers import stop_at

from spiralrope_cli import GaussianDiffusion, create_model
from spiralrope_cli.core.data.latents import write_shard
from spiralrope_cli.core.data.shards import CachePlan
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.kernels import has_rotary_kernel, modulate, rotate_qkv
from spiralrope_cli.core.models.factory import cast_matmuls, compile_blocks
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime import run_folder
from spiralrope_cli.core.runtime.device import DTYPES, allow_tf32, autocast
from spiralrope_cli.core.runtime.distributed import StopRequest, open_context
from spiralrope_cli.core.training import loop
from spiralrope_cli.core.training.step import LossMeter, train_step

DEVICE = torch.device(os.environ.get("SPIRALROPE_GPU_TESTS", "cuda:0"))
ON_GPU = DEVICE.type == "cuda"
WITHIN = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 3e-2}
"""Largest relative distance from fp32 on the CPU."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch finds no GPU"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="of GPUs alone")


@pytest.fixture(params=["fp32", "tf32", "bf16"])
def precision(request):
    """Sets what that precision sets, and resets it."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if ON_GPU:
        allow_tf32(request.param != "fp32")
    yield request.param
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = conv


def network(arch):
    """A small network whose branches count."""
    torch.manual_seed(0)
    size = {"input_size": 16} if arch.startswith("dit") else {"image_size": 64, "patch_size": 8}
    model = create_model(arch, num_classes=10, **size)
    for name, parameter in model.named_parameters():
        if "adaLN" in name or "gamma" in name or name.startswith("final_layer"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def results(model, precision, device):
    """Loss, output and gradients of one step, on the CPU."""
    model, draw = model.to(device), torch.Generator().manual_seed(1)
    dit = hasattr(model, "t_embedder")
    images = torch.randn(8, *((4, 16, 16) if dit else (3, 64, 64)), generator=draw)
    noise, t = torch.randn(images.shape, generator=draw), torch.arange(8) * 100
    images, noise, t, y = (each.to(device) for each in (images, noise, t, torch.arange(8)))
    with autocast(device, DTYPES[precision]):
        out = model(images, t, y) if dit else model(images)
        if dit:
            loss = GaussianDiffusion().training_losses(model, images, t, noise, y=y)["loss"].mean()
        else:
            loss = torch.nn.functional.cross_entropy(out.float(), y)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {"loss": loss.detach(), "out": out.detach()}
    return {name: value.float().cpu() for name, value in found.items()}


@pytest.mark.parametrize("arch", ["deit-128x3x2", "dit-128x3x2-2"])
def test_outputs_and_gradients_are_those_of_the_cpu(arch, precision):
    expected = results(network(arch), "fp32", torch.device("cpu"))
    found = results(network(arch), precision, DEVICE)
    assert relative_distance(found, expected) < WITHIN[precision]


@pytest.mark.parametrize("arch", ["deit-128x3x2", "dit-128x3x2-2"])
def test_compiled_blocks_compute_what_eager_ones_do(arch, precision):
    eager = results(network(arch), precision, DEVICE)
    torch._dynamo.reset()
    compiled, lines = network(arch), []
    compile_blocks(compiled, say=lines.append)
    found = results(compiled, precision, DEVICE)
    assert len(lines) == 1, lines
    assert relative_distance(found, eager) < WITHIN[precision]


@pytest.mark.parametrize("arch", ["deit-128x3x2", "dit-128x3x2-2"])
def test_matmuls_that_are_cast_once_are_as_exact_as_autocast(arch):
    model, y = network(arch).to(DEVICE).eval(), torch.arange(8, device=DEVICE)
    shape, given = ((4, 16, 16), (y * 100, y)) if arch.startswith("dit") else ((3, 64, 64), ())
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.inference_mode():
        exact = {"out": model(images, *given)}
        with autocast(DEVICE, torch.bfloat16):
            expected = {"out": model(images, *given).float()}
        cast_matmuls(model, torch.bfloat16)
        found = {"out": model(images, *given).float()}
    assert relative_distance(found, exact) < 1.1 * relative_distance(expected, exact) < 0.03


@needs_gpu
def test_fp32_is_fp32_and_tf32_is_not(precision):
    a, b = torch.randn(2, 1024, 1024, dtype=torch.float64)
    exact = (a @ b).to(DEVICE)
    product = (a.float().to(DEVICE) @ b.float().to(DEVICE)).double()
    distance = (product - exact).norm() / exact.norm()
    assert (distance.item() < 1e-6) is (precision == "fp32")


@needs_gpu
@pytest.mark.parametrize("size", [*ROTATION_SIZES, (64, 197, 6, 64), (8, 256, 16, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_of_the_rotation_is_the_formula(size, dtype):
    qkv, grads, cos_sin = rotation_inputs(size, dtype, DEVICE)
    assert has_rotary_kernel(qkv, cos_sin.float())
    found = rotation_results(rotate_qkv, qkv, cos_sin.float(), grads)
    exact = rotation_results(rotation_formula, qkv.double(), cos_sin, grads)
    for ours, float64 in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), float64, rtol=eps, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("size", [*MODULATION_SIZES, (64, 256, 1152)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_adaptive_layer_norm_is_the_formula(size, dtype):
    given = modulation_inputs(size, DEVICE)
    exact = modulation_formula(*(each.double() for each in given), 1e-6)
    found, eps = modulate(*given, 1e-6, dtype), torch.finfo(dtype).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=2e-6)


def cached_latents(folder, count=256):
    """Latents of 32 px as `dit-encode` writes them: random."""
    random = {"data": "random", "files_sha256": "", "vae": "random", "vae_sha256": ""}
    sizes = {"class_names": ("one",), "num_files": count, "image_size": (32, 32)}
    plan = CachePlan(**random, **sizes, precision="float32", shard_size=count)
    moments = torch.rand(2, count, 2, *plan.latent_shape, generator=torch.Generator())
    folder.mkdir(exist_ok=True)
    write_shard(folder, plan, 0, *moments, torch.zeros(count, dtype=torch.int64), {})


def run_of(command, out="run", **more):
    """A run of a few steps on the digits, or on the latents of the working folder."""
    if command == "latents":
        cached_latents(Path("latents"))
        command, more = "dit-train", {"latents": "latents", "sample_every": 0, **more}
    arch = "dit-64x2x2-2" if command == "dit-train" else "deit-64x2x2"
    given = {"arch": arch, "max_steps": 8, "warmup_epochs": 0, "log_every": 4, "nproc": 1}
    given |= {"precision": "bf16", "device": DEVICE.type, "out": out}
    return resolve(command, {**given, **more}).run


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("command", ["pretrain", "dit-train", "latents"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(runs, monkeypatch, command, compiled):
    whole, parts = (run_of(command, out) for out in ("whole", "parts"))
    for run in (whole, parts):
        object.__setattr__(run.machine, "compile", compiled)
    train.work(whole)
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", stop_at(4))
        with contextlib.suppress(SystemExit):
            train.work(parts)
    assert run_folder.steps_on_disk(runs / "parts") == [4]
    train.work(parts)
    for kind in ("model", "ema"):
        file = f"checkpoints/0000008/{kind}.safetensors"
        assert same_tensors(load_file(runs / "parts" / file), load_file(runs / "whole" / file))


@needs_gpu
@pytest.mark.parametrize("command", ["pretrain", "dit-train", "latents"])
def test_no_step_waits_for_the_device(runs, command):
    run = run_of(command)
    with open_context(run.machine, Path(run.out)) as ctx:
        task = train.open_task(run, ctx)
        state, forward = loop.build_state(run, ctx, 0, lambda model: None)
        meter = LossMeter(ctx.device)
        with contextlib.closing(task.data.train_steps(0, 8)) as batches:
            for number in range(6):
                torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
                try:
                    loss, _ = train_step(
                        state, forward, next(batches), lambda *given: task.loss(state, *given)
                    )
                    meter.add(number, loss)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def test_samples_are_those_of_the_cpu(spiralrope, drawn_once):
    words = ("--num-samples", 10, "--num-sampling-steps", 8, "--nproc", 1, "--precision", "fp32")
    images = []
    for out, device in (("one", DEVICE.type), ("two", DEVICE.type), ("cpu", "cpu")):
        spiralrope("dit-sample", drawn_once, *words, "--device", device, "--out", out)
        images.append(np.load(Path(out) / "samples.npz")["arr_0"].astype(int))
    assert np.array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() <= 1


def test_metrics_are_those_of_the_cpu(spiralrope, inception_weights, digit_pictures, runs):
    np.savez("a.npz", digit_pictures[:64])
    np.savez("b.npz", digit_pictures[64:128])
    words = ("a.npz", "b.npz", "--weights", inception_weights, "--kid-subset-size", 32, "--json")
    here, cpu = (
        json.loads(spiralrope("fid", *words, "--device", device, "--nproc", 1).stdout)
        for device in (DEVICE.type, "cpu")
    )
    for name in ("fid", "sfid", "is", "kid", "precision", "recall"):
        assert here[name] == pytest.approx(cpu[name], rel=1e-4, abs=1e-6), name
