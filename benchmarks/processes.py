"""How fast are two processes of one thread beside one process of two threads?

Train steps of the loop itself (AdamW, EMA, DDP over gloo), with the same images in all. The two
processes sleep while the one computes, and the other way round. The gradient all-reduce, and the
optimizer step that each process repeats, are what two processes pay.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from interleave import CPU, DTYPES, interleaved, median, prepare, ratio, show
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from spiralrope_cli import GaussianDiffusion, create_model
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.core.runtime.device import autocast
from spiralrope_cli.core.runtime.launch import share_the_machine
from spiralrope_cli.core.training.step import TrainState, train_step

MODELS = {"deit-s": "pretrain", "dit-s2": "dit-train"}


def deit_loss(dtype: str, batch: int) -> Callable[[nn.Module, None], Tensor]:
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))

    def loss(model: nn.Module, _: None) -> Tensor:
        with autocast(CPU, DTYPES[dtype]):
            return F.cross_entropy(model(images).float(), labels)

    return loss


def dit_loss(dtype: str, batch: int) -> Callable[[nn.Module, None], Tensor]:
    latents, noise = torch.randn(2, batch, 4, 32, 32)
    t, labels = torch.randint(0, 1000, (2, batch))

    def loss(model: nn.Module, _: None) -> Tensor:
        with autocast(CPU, DTYPES[dtype]):
            losses = GaussianDiffusion().training_losses(model, latents, t, noise, y=labels)
        return losses["loss"].mean()

    return loss


def make_step(name: str, dtype: str, batch: int) -> Callable[[], object]:
    """A train step of this process's part of a batch, as a call."""
    prepare()
    model = create_model(name).train()
    state = TrainState.create(model, resolve(MODELS[name], {"arch": name}).run.optim)
    forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    loss = (deit_loss if name == "deit-s" else dit_loss)(dtype, batch)
    return partial(train_step, state, forward if dist.get_world_size() > 1 else model, [None], loss)


def serve(rank: int, size: int, meeting: str, name: str, dtype: str, batch: int, ask: Connection):
    """A process of `size` that makes one step for each question."""
    torch.set_num_threads(2 // size)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    step = make_step(name, dtype, batch // size)
    while ask.recv():
        step()
        ask.send(True)
    dist.destroy_process_group()


class Processes:
    """Several processes that train together when called."""

    def __init__(self, size: int, meeting: Path, *what: object) -> None:
        self.ends, self.children = [], []
        for rank in range(size):
            mine, its = multiprocessing.Pipe()
            arguments = (rank, size, str(meeting), *what, its)
            child = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
            child.start()
            self.ends.append(mine)
            self.children.append(child)

    def __call__(self) -> None:
        """One step of all."""
        for end in self.ends:
            end.send(True)
        for end in self.ends:
            end.recv()

    def close(self) -> None:
        """Ends them."""
        for end, child in zip(self.ends, self.children, strict=True):
            end.send(False)
            child.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--models", nargs="*", default=[*MODELS])
    given = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    for name in given.models:
        what = (name, given.dtype, given.batch)
        with TemporaryDirectory() as folder:
            sides = {
                f"{size} x {2 // size} thread(s)": Processes(size, Path(folder, str(size)), *what)
                for size in (2, 1)
            }
            seconds = interleaved(sides, given.rounds)
            for each in sides.values():
                each.close()
        rows = [(side, f"{given.batch / median(seconds[side]):.2f} images/s") for side in seconds]
        faster = 1 / ratio(seconds, *seconds)
        rows.append(("RATIO 2 processes / 1 process", f"{faster:.3f}"))
        show(f"{name}, {given.dtype}, batch {given.batch}", rows)


if __name__ == "__main__":
    share_the_machine()
    main()
