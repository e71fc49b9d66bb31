"""Attention maps. Fused attention returns no weights, so they are computed again from its q and k.

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
    """Records q, k and v, [B, H, N, D] each, of every call of fused attention."""

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
        """Makes the call, and records it if it is attention."""
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], args[2]))
        return func(*args, **(kwargs or {}))


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) in float32: [B, H, M, D] and [B, H, N, D] -> [B, H, M, N]."""
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)


@torch.no_grad()
def attention_from(model: nn.Module, images: Tensor, token: int, layers: Sequence[int]) -> Tensor:
    """Attention weights of one query token.

    Args:
        model: a network with one fused attention per layer.
        images: [B, channels, height, width], normalised.
        token: index of the query; prefix tokens come first.
        layers: indices of layers.

    Returns:
        [layers, B, H, N] float32; each row sums to 1.
    """
    with Watch() as watch:
        model(images)
    chosen = [watch.calls[layer] for layer in layers]
    return torch.stack([attention_weights(q[:, :, [token]], k)[:, :, 0] for q, k, _ in chosen])
