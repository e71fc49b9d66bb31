"""Precision of a device: what it is, and that fp32 is fp32."""

from __future__ import annotations

import pytest
import torch

from spiralrope_cli.core.runtime import device as devices
from spiralrope_cli.core.runtime.device import pick_precision, prepare_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of that compute capability, as far as the choice of a precision looks at it."""

    def make(major):

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: major >= 8)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        return GPU

    return make


@pytest.mark.parametrize(
    ("capability", "setting", "precision"),
    [
        *[(9, each, each) for each in ("bf16", "tf32", "fp32")],
        (9, "auto", "bf16"),
        (7, "auto", "fp32"),
        (7, "tf32", "fp32"),
        (7, "bf16", "bf16"),
    ],
)
def test_precision_of_gpus(gpu, capability, setting, precision):
    found, reason = pick_precision(setting, gpu(capability))
    assert found == precision
    assert reason


def test_amd_has_no_tf32(gpu, monkeypatch):
    device = gpu(9)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert pick_precision("tf32", device) == ("fp32", "this GPU has no TF32")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_precision_of_cpus(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert pick_precision("auto", CPU)[0] == ("bf16" if has_bf16 else "fp32")
    assert pick_precision("bf16", CPU)[0] == "bf16"
    assert pick_precision("tf32", CPU) == ("fp32", "this CPU has no TF32")


@pytest.mark.parametrize("precision", list(devices.DTYPES))
def test_fp32_allows_no_tf32(gpu, monkeypatch, precision):
    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    allowed = cudnn.allow_tf32
    try:
        prepare_device(gpu(9), precision)
        exact = precision == "fp32"
        assert torch.get_float32_matmul_precision() == ("highest" if exact else "high")
        assert cudnn.allow_tf32 is not exact
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = allowed


def test_a_cpu_keeps_its_settings():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    prepare_device(CPU, "fp32")
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
