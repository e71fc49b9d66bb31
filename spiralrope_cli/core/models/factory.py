from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.dit_runs import TrainingRun
from spiralrope_cli.core.config.models import RopeConfig, is_dit, size_of
from spiralrope_cli.core.errors import ConfigError, first_line
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.models.dit import DiT

LONG_RUN_FLOPS = 2e16
"""Of a forward pass, from which on compiled blocks win back the wait on GPUs: about a minute."""
OF_BOTH = ("rope", "num_classes")
OF_DEIT = ("image_size", "patch_size", "in_chans", "pretrain_grid", "drop_path")
OF_DIT = ("input_size", "in_chans", "pretrain_grid", "label_dropout", "qk_norm")


def create_model(
    arch: str, *, rope: RopeConfig | None = None, num_classes: int = 1000, **options: Any
) -> DeiT | DiT:
    """A network by name, with random weights.

    Args:
        arch: `deit-ti` to `deit-l`, or `dit-ti2` to `dit-xl8` (the same as `DiT-XL/8`; the digit
            is the patch side); sizes by numbers too: `deit-WIDTHxDEPTHxHEADS`,
            `dit-WIDTHxDEPTHxHEADS-PATCH`.
        rope: options of the rotary embedding; by default `RopeConfig()`.
        num_classes: outputs of a DeiT; classes of a DiT, without the null class.
        options: for a DeiT image_size, patch_size, in_chans, pretrain_grid, drop_path;
            for a DiT input_size, in_chans, pretrain_grid, label_dropout, qk_norm.

    Raises:
        ConfigError: unknown name, option of the other network, or sizes that do not fit.
    """
    rope = rope if rope is not None else RopeConfig()
    known = OF_DIT if is_dit(arch) else OF_DEIT
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{arch} has no option {name}", f"it has {', '.join(OF_BOTH + known)}"
            )
    *sizes, patch_size = size_of(arch)
    if not is_dit(arch):
        return DeiT(*sizes, rope=rope, num_classes=num_classes, **options)
    return DiT(*sizes, rope=rope, patch_size=patch_size, num_classes=num_classes, **options)


def model_of(run: TrainingRun) -> DeiT | DiT:
    """The network of a run, with random weights."""
    options = asdict(run.model)
    if "class_dropout_prob" in options:
        options["label_dropout"] = options.pop("class_dropout_prob")
    return create_model(run.arch, rope=run.rope, **options)


def pays_to_compile(setting: str, model: DeiT | DiT, device: torch.device, images: float) -> bool:
    """What `--compile` is for a model that sees that many images; in training each counts thrice.

    On GPUs the wait is won back after about a minute of work. On CPUs it is not worth it.
    """
    if setting != "auto" or device.type != "cuda":
        return setting == "on"
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    return 2 * weights * model.grid[0] * model.grid[1] * images >= LONG_RUN_FLOPS


def compile_blocks(*models: nn.Module, say: Callable[[str], None]) -> None:
    """Compiles each block in place, when it is first called; parameter names do not change.

    All blocks share one graph, so the time is that of one block. Cosines and sines are an argument
    of the block: computed inside, they would break the graph, or become a constant of it, which
    another model would then use too. Where compilation fails, `say` says why, and all are eager.
    """
    blocks = [block for model in models for block in cast(DeiT, model).blocks]

    def or_eager(compiled: Any, block: nn.Module) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            try:
                return compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ImportError, OSError) as error:
                give_up(error)
            return block(*args, **kwargs)

        return call

    def give_up(error: Exception) -> None:
        for block in blocks:
            block._compiled_call_impl = None
        say(f"note: torch.compile failed, so the run is eager: {first_line(error)}")

    # Who computes in fp32 has chosen it.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    # DDP would split the graph of each block where a bucket is full. Its gradients come together.
    torch._dynamo.config.optimize_ddp = False
    say("compiling the blocks; the first steps take longer, up to a minute (--compile off: eager)")
    try:
        for block in blocks:
            block.compile()
            block._compiled_call_impl = or_eager(block._compiled_call_impl, block)
    except RuntimeError as error:  # a Python that this torch does not compile for
        give_up(error)


def cast_matmuls(model: DeiT | DiT, dtype: torch.dtype) -> None:
    """Casts once what autocast casts in every call, for inference; then call it without autocast.

    The numbers are those of autocast, but for the GELU of a DiT on a GPU (`kernels.Linear`). Norms,
    rotation and residual stream keep their precision; of a DiT embedders, modulation and final
    layer too, which autocast leaves alone.
    """
    for name, module in model.named_modules():
        of_blocks = "blocks." in name and "adaLN" not in name
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (of_blocks or isinstance(model, DeiT)):
            module.to(dtype)


def meta_inputs(run: TrainingRun, batch_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs on meta: images [B, channels, H, W]; for a DiT also timesteps, labels [B]."""
    images = torch.empty(batch_size, *run.input_shape, device="meta", dtype=dtype)
    integers = torch.empty(batch_size, device="meta", dtype=torch.int64)
    return [images, *[integers] * run.num_conditions]


def model_cost(run: TrainingRun) -> tuple[int, int]:
    """Number of parameters, and FLOPs of the matmuls of one forward pass on one image.

    By shapes: a forward pass on meta imports torch.compile, which takes two seconds.
    """
    with torch.device("meta"):  # shapes without memory
        network = model_of(run)
    patches = math.prod(run.grid)
    tokens = patches + isinstance(network, DeiT)  # the class token
    flops = len(network.blocks) * 4 * tokens**2 * size_of(run.arch).dim
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            of_vector = any(part in name for part in ("adaLN", "t_embedder", "head"))
            rows = 1 if of_vector else tokens if "blocks." in name else patches
            flops += 2 * rows * module.weight.numel()
    return sum(p.numel() for p in network.parameters()), flops
