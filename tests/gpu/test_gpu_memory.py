"""What fits into the memory of a GPU is found there, and features of fid never wait for it.

SPIRALROPE_GPU_TESTS=cpu runs what a CPU can show of them.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import yaml

from spiralrope_cli.core.data.images import ImageBatch
from spiralrope_cli.core.jobs import train
from spiralrope_cli.core.metrics.features import Sums, in_features
from spiralrope_cli.core.metrics.inception import build_extractor
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.distributed import DistContext, StopRequest
from spiralrope_cli.core.training.advice import with_fitting_micro_batch
from spiralrope_cli.core.training.step import TrainState, train_step

DEVICE = torch.device(os.environ.get("SPIRALROPE_GPU_TESTS", "cuda:0"))
ON_GPU = DEVICE.type == "cuda"
CTX = DistContext(0, 1, DEVICE, "fp32", "", StopRequest())

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch finds no GPU"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="of GPUs alone")


def run_of(command="pretrain", **options):
    fast = {"max_steps": 2, "warmup_epochs": 0, "nproc": 1, "device": DEVICE.type}
    return resolve(command, {**fast, "compile": "off", **options}).run


@pytest.mark.parametrize(
    ("command", "arch"), [("pretrain", "deit-64x2x2"), ("dit-train", "dit-64x2x2-2")]
)
def test_a_small_network_takes_its_whole_batch_and_keeps_the_number(runs, command, arch):
    train.work(run_of(command, arch=arch, batch_size=64, out="run"))
    kept = yaml.safe_load((runs / "run/config.yaml").read_text())["optim"]["micro_batch_size"]
    assert kept == (64 if ON_GPU or command == "dit-train" else 32)


@needs_gpu
def test_in_little_memory_a_part_of_the_batch_is_taken_and_fits(runs):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    taken = torch.empty(max(free - 3 * 2**30, 0), dtype=torch.uint8, device=DEVICE)
    options = {"arch": "deit-s", "image_size": (224, 224), "patch_size": 16, "precision": "fp32"}
    run = run_of(batch_size=1024, **options)
    task = train.open_task(run, CTX)
    run = with_fitting_micro_batch(run, CTX, task)
    size, accumulated = run.split_batch(1)
    assert 8 <= size < 1024 == size * accumulated
    state = TrainState.create(train_model(run), run.optim)
    micro = task.black(size)
    train_step(state, state.model, [micro, micro], lambda *given: task.loss(state, *given))
    torch.cuda.synchronize()
    del taken


def train_model(run):
    from spiralrope_cli.core.models.factory import model_of

    return model_of(run).to(DEVICE)


def test_features_are_summed_without_a_wait(inception_weights):
    network = build_extractor(torch.load(inception_weights), inception_weights).to(DEVICE)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images = images.pin_memory() if ON_GPU else images
    batches = [ImageBatch([4 * n + i for i in range(4)], [images]) for n in range(4)]
    parts = ("fid", "sfid", "is", "features")
    sums = Sums(parts, range(16), 16, DEVICE)
    with (
        torch.inference_mode(),
        contextlib.closing(in_features(batches, network, parts, CTX)) as found,
    ):
        for number in range(4):
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
            try:
                batch, features = next(found)
                sums.add(batch.numbers, features)
            finally:
                if ON_GPU:
                    torch.cuda.set_sync_debug_mode("default")
    assert sums.merged().num == 16
