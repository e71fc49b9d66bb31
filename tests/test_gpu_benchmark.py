"""Each part of benchmarks/gpu.py runs, also on a machine without a GPU."""

from __future__ import annotations

import gpu
import pytest
import timm
import torch


@pytest.fixture
def settings_kept():
    """What a benchmark sets for the whole process."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    before = (cudnn.allow_tf32, cudnn.benchmark)
    yield
    torch.set_float32_matmul_precision(matmul)
    cudnn.allow_tf32, cudnn.benchmark = before


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_of_the_benchmark_prints_its_table(
    part, settings_kept, runs, inception_weights, monkeypatch, capsys
):
    if part == "deit-s" and not timm.is_model("vit_small_patch16_rope_ape_224"):
        pytest.skip("this timm is older than its ViT with RoPE")
    monkeypatch.setattr(gpu, "matrix_rate", lambda device, dtype: 1e9)
    gpu.main([part, "--tiny", "--device", "cpu", "--inception", str(inception_weights)])
    said = capsys.readouterr().out
    assert "1.000 × the first" in said
    assert f"{part}: " in said
    if part.startswith("loop"):
        assert "SHARE of the bare step" in said


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["fast", "--device", "cpu"])
    assert "no such part: fast; there are deit-s, " in capsys.readouterr().err


def test_where_a_part_fails_the_others_are_measured(monkeypatch, settings_kept, capsys):
    def broken(bench):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "matrix_rate", lambda device, dtype: 1e9)
    parts = {"first": broken, "second": lambda bench: print("measured")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    with pytest.raises(SystemExit, match="failed: first"):
        gpu.main(["--device", "cpu"])
    said = capsys.readouterr()
    assert "measured" in said.out
    assert "no such kernel" in said.err
