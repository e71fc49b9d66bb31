"""Features of the Inception network of 2015-12-05, as papers use it: torch-fidelity's, but faster.

Batch norms are folded into the convolutions, and the memory format is channels last, where that is
faster. Both change only the rounding of float32.

Legend: B batch, D features, K classes.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Collection
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spiralrope_cli.core.errors import CheckpointError

SIDE, NUM_CLASSES = 299, 1008
_FIRST_BLOCK = "Mixed_5b"
_FEW = 4
"""Images at a time before the first block, on a CPU. There the activations are largest: more
images would not be faster, and would need most of the memory."""
_SPATIAL_CHANNELS = 7
_SPATIAL_STAGE = "Mixed_6d"


Features = dict[str, Tensor]
"""The features that were asked for: `pool` [B, 2048] for FID, KID, precision and recall; `spatial`
[B, 2023] for sFID; `logits` [B, 1008], without the bias, for the Inception Score."""


class InceptionFeatures(nn.Module):
    """Images to features; thread-safe.

    Args:
        weights: state dict of torch-fidelity's extractor, float32.
        planes: the memory format is contiguous, not channels last.

    Raises:
        RuntimeError: the weights do not fit the network.
    """

    def __init__(self, weights: dict[str, Tensor], *, planes: bool = False) -> None:
        super().__init__()
        self.memory_format = torch.contiguous_format if planes else torch.channels_last
        network = _network(weights)
        _fold_batch_norms(network)
        # The children are registered in the order in which forward calls them; `fc` is the last.
        stages = dict(network.named_children())
        classifier = cast(nn.Linear, stages.pop("fc"))
        before = list(stages)[: list(stages).index(_FIRST_BLOCK)]
        self.stem = nn.Sequential(*(stages.pop(name) for name in before))
        self.stages = nn.ModuleDict(stages)
        self.to(memory_format=self.memory_format)
        self.register_buffer("classes", classifier.weight.detach().T.clone())
        self._spatial: dict[int, Tensor] = {}  # by thread
        branch = self.stages.get_submodule(f"{_SPATIAL_STAGE}.branch1x1")
        branch.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._spatial[threading.get_ident()] = output[:, :_SPATIAL_CHANNELS]

    def forward(
        self, groups: list[Tensor], wanted: Collection[str] = ("pool", "spatial", "logits")
    ) -> Features:
        """Features of all images in the order of the groups: float32, logits float64.

        Args:
            groups: images [B, 3, h, w] uint8, one tensor per size.
            wanted: names of the features.
        """
        at_once = _FEW if self.classes.device.type == "cpu" else max(map(len, groups))
        few = [part for group in groups for part in group.split(at_once)]
        inputs = (resize(part).sub_(128).div_(128) for part in few)
        layout = self.memory_format
        x = torch.cat([self.stem(x.contiguous(memory_format=layout)) for x in inputs])
        for name, stage in self.stages.items():
            x = stage(x)
            if name == _SPATIAL_STAGE and set(wanted) == {"spatial"}:
                break
        # Flattened as height, width, channel, as in ADM.
        spatial = self._spatial.pop(threading.get_ident()).float().permute(0, 2, 3, 1).flatten(1)
        found = {"pool": x.float().flatten(1), "spatial": spatial}
        if "logits" in wanted:
            # In float32 the result of a row depends on the batch size; in float64 it does not.
            dtype = torch.float32 if x.device.type == "mps" else torch.float64
            found["logits"] = found["pool"].to(dtype) @ cast(Tensor, self.classes).to(dtype)
        return {name: found[name] for name in wanted}


def resize(images: Tensor) -> Tensor:
    """[B, 3, h, w] -> float32 [B, 3, 299, 299], bilinear as in TensorFlow 1.

    Output pixel i samples position i * h / 299, without the usual offset of half a pixel.
    `F.interpolate` offers only that offset, or aligned corners.
    """
    images = images.float()
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(SIDE, device=images.device) * torch.tensor(size / SIDE)
        low = at.long()
        weight = (at - low).view((-1, 1) if dim == 2 else (-1,))
        high = (low + 1).clamp_max(size - 1)
        images = torch.lerp(images.index_select(dim, low), images.index_select(dim, high), weight)
    return images


def build_extractor(weights: object, path: Path, *, planes: bool = False) -> InceptionFeatures:
    """The network in eval mode; `weights` is what the file `path` holds."""
    if not isinstance(weights, dict) or "Mixed_7c.branch_pool.conv.weight" not in weights:
        raise CheckpointError(
            f"{path} does not hold the Inception weights of 2015-12-05",
            "spiralrope fetch inception downloads them",
        )
    try:
        return InceptionFeatures(weights, planes=planes).eval()
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is of another network: {str(error).splitlines()[1].strip()[:150]}",
            "spiralrope fetch inception downloads the weights of 2015-12-05",
        ) from error


def _network(weights: dict[str, Tensor]) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        """Without weights: the constructor would unpickle its file without weights_only."""

        def load_state_dict(self, *args: object) -> None:
            """Does nothing."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device("meta"):
        network = Unloaded("inception", ["2048"], nothing)
    nn.Module.load_state_dict(network, weights, assign=True)
    return network


def _fold_batch_norms(module: nn.Module) -> None:
    """In float64, for less rounding; layer by layer, for less memory."""
    for child in module.children():
        norm = getattr(child, "bn", None)
        if isinstance(norm, nn.BatchNorm2d):
            convolution = cast(nn.Conv2d, child.conv)
            child.conv = fuse_conv_bn_eval(convolution.double(), norm.double()).float()
            child.bn = nn.Identity()
        else:
            _fold_batch_norms(child)
