"""Attention maps, recomputed from the q and k of each fused attention, which returns no weights.

Legend: B batch, N tokens with the prefix, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """Records q, k and v, [B, H, N, D], of every fused attention inside, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Records an attention, and makes the call."""
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], args[2]))
        return func(*args, **(kwargs or {}))


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) in float32: [B, H, M, D] and [B, H, N, D] -> [B, H, M, N]."""
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)


@torch.no_grad()
def attention_from(model: nn.Module, images: Tensor, token: int, layers: Sequence[int]) -> Tensor:
    """What one token attends to.

    Args:
        model: a network with one fused attention per layer.
        images: [B, channels, height, width], normalised.
        token: the query's number, prefix tokens first.
        layers: numbers of layers.

    Returns:
        [layers, B, H, N] float32, every row of it with the sum 1.
    """
    with Watch() as watch:
        model(images)
    chosen = [watch.calls[layer] for layer in layers]
    return torch.stack([attention_weights(q[:, :, [token]], k)[:, :, 0] for q, k, _ in chosen])
