"""Features of the Inception of 2015-12-05, the field's: torch-fidelity's network, made faster.

Batch norms are folded into the convolutions before them, and memory is laid out with the channels
last. Both change float32 rounding alone.

Legend: B batch, D features, K classes.
"""

from __future__ import annotations

import io
import pickle
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spiralrope_cli.core.errors import CheckpointError

SIDE = 299
POOL_SIZE, SPATIAL_SIZE, NUM_CLASSES = 2048, 2023, 1008
_SPATIAL_CHANNELS = 7
_SPATIAL_STAGE = "Mixed_6d"


@dataclass(frozen=True)
class Features:
    """What the network says of B images; None where it was not asked.

    Attributes:
        pool: [B, 2048], of FID, KID, precision and recall.
        spatial: [B, 2023], of sFID.
        logits: [B, 1008] float64, without the bias, of the Inception Score.
    """

    pool: Tensor | None
    spatial: Tensor | None
    logits: Tensor | None


class InceptionFeatures(nn.Module):
    """From images to features.

    Args:
        weights: state dict of torch-fidelity's extractor, float32.
        pool: whether pool features are wanted.
        spatial: whether spatial features are wanted.
        logits: whether logits are wanted.

    Raises:
        RuntimeError: the weights are of another network.
    """

    def __init__(
        self, weights: dict[str, Tensor], *, pool: bool, spatial: bool, logits: bool
    ) -> None:
        super().__init__()
        self.pool, self.spatial, self.logits = pool, spatial, logits
        network = _network(weights).double()  # folded in float64, so that nothing is rounded twice
        _fold_batch_norms(network)
        # Its parts are registered in the order in which its forward calls them; `fc` is the last.
        stages = dict(network.float().named_children())
        classifier = cast(nn.Linear, stages.pop("fc"))
        if not pool and not logits:
            names = list(stages)
            stages = {name: stages[name] for name in names[: names.index(_SPATIAL_STAGE) + 1]}
        self.trunk = nn.Sequential()
        for name, stage in stages.items():
            self.trunk.add_module(name, stage)
        self.trunk.to(memory_format=torch.channels_last)
        self.register_buffer("classes", classifier.weight.detach().T)
        self._seen: dict[int, Tensor] = {}  # by thread, as several may call at the same time
        if spatial:
            branch = self.trunk.get_submodule(f"{_SPATIAL_STAGE}.branch1x1")
            branch.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._seen[threading.get_ident()] = output

    def forward(self, groups: list[Tensor]) -> Features:
        """Features of images [B, 3, h, w] uint8, a tensor for every size, in their order."""
        x = torch.cat([resize(group) for group in groups]).sub_(128).div_(128)
        x = self.trunk(x.contiguous(memory_format=torch.channels_last)).float()
        pool = x.flatten(1) if self.pool or self.logits else None
        spatial = logits = None
        if self.spatial:
            seen = self._seen.pop(threading.get_ident())[:, :_SPATIAL_CHANNELS].float()
            spatial = seen.permute(0, 2, 3, 1).flatten(1)  # height, width, channel, as ADM has it
        if self.logits and pool is not None:
            # In float64, where a row of a product does not depend on how many rows there are.
            wide = pool.dtype if pool.device.type == "mps" else torch.float64
            logits = pool.to(wide) @ self.classes.to(wide)
        return Features(pool if self.pool else None, spatial, logits)


def resize(images: Tensor) -> Tensor:
    """[B, 3, h, w] as float32 [B, 3, 299, 299], bilinear as TensorFlow 1 did it.

    Output pixel i looks at i * h / 299, without the half pixel that would centre it.
    """
    images = images.float()
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(SIDE, device=images.device) * torch.tensor(size / SIDE)
        low = at.long()
        share = (at - low).view((-1, 1) if dim == 2 else (-1,))
        high = (low + 1).clamp_max(size - 1)
        images = torch.lerp(images.index_select(dim, low), images.index_select(dim, high), share)
    return images


def load_weights(path: Path) -> dict[str, Tensor]:
    """The extractor's state dict, without ever running what a file may hold.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"weights {path} cannot be read: {str(error).splitlines()[0] or type(error).__name__}",
            "spiralrope fetch inception brings the right ones",
        ) from error
    if not isinstance(weights, dict) or "Mixed_7c.branch_pool.conv.weight" not in weights:
        raise CheckpointError(
            f"{path} does not hold the weights of the Inception of 2015-12-05",
            "spiralrope fetch inception brings them",
        )
    return weights


def load_extractor(path: Path, *, pool: bool, spatial: bool, logits: bool) -> InceptionFeatures:
    """The network with the weights of a file, ready to be called.

    Raises:
        CheckpointError: the file cannot be read, or is of another network.
    """
    try:
        model = InceptionFeatures(load_weights(path), pool=pool, spatial=spatial, logits=logits)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is of another network: {str(error).splitlines()[1].strip()[:150]}",
            "spiralrope fetch inception brings the weights of 2015-12-05",
        ) from error
    return model.eval()


def _network(weights: dict[str, Tensor]) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The constructor unpickles its file without limits, so it gets one that was read safely.
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return FeatureExtractorInceptionV3("inception", ["2048"], file)


def _fold_batch_norms(module: nn.Module) -> None:
    for child in module.children():
        norm = getattr(child, "bn", None)
        if isinstance(norm, nn.BatchNorm2d):
            child.conv = fuse_conv_bn_eval(cast(nn.Conv2d, child.conv), norm)
            child.bn = nn.Identity()
        else:
            _fold_batch_norms(child)
