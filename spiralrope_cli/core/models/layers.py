"""Parts of the networks. Legend: B batch, N tokens, C width, H heads, D channels of a head."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from spiralrope_cli.core.rope import turn


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What is computed inside keeps the dtype of its inputs."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()  # Such as "meta".


Gelu = Literal["none", "tanh"]
"""Exact or approximated, in the words of `F.gelu(approximate=)`."""


class Linear(nn.Linear):
    """`nn.Linear` that infers with oneDNN on a CPU, as torch.compile does there.

    Its product in fp32 takes half the time of MKL's on AMD's CPUs and a quarter to a half for few
    rows, and GELU is taken on the way out. It has no gradient.
    """

    def forward(self, input: Tensor, gelu: Gelu | None = None) -> Tensor:
        """[..., in] -> [..., out], under autocast in its dtype; then GELU where it is named."""
        if (dtype := _onednn_dtype(input, self.weight)) is not None:
            given = (each.to(dtype) for each in (input, self.weight, self.bias))
            after = "none" if gelu is None else "gelu"
            return torch.ops.mkldnn._linear_pointwise(*given, after, [], gelu or "")
        out = super().forward(input)
        if gelu is None:
            return out
        return gelu_tanh(out) if gelu == "tanh" else F.gelu(out)


def _onednn_dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """What oneDNN computes such a product in, None where it is not for oneDNN."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if input.device.type != "cpu" or not input.numel() or not torch.backends.mkldnn.is_available():
        return None
    dtypes = {input.dtype, weight.dtype}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype("cpu")}
    if dtypes == {torch.bfloat16}:
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return torch.float32 if dtypes == {torch.float32} else None


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        """What `FlopCounterMode` counts for it, as for any other linear layer."""
        return 2 * math.prod(x) * weight[0]


class RMSNorm(nn.Module):
    """scale * x / (rms(x) + eps), with eps outside the root as the published weights have it."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the scale's dtype, the statistic in float32 or better."""
        wide = x if x.dtype == torch.float64 else x.float()
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        return (wide * (rms + self.eps).reciprocal() * self.scale).to(self.scale.dtype)


class Attention(nn.Module):
    """Multi-head self-attention whose queries and keys are turned by the given table.

    With `qk_norm` each head's queries and keys are normalised before they are turned.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, turns: Tensor | None) -> Tensor:
        """[B, N, C] and [N, D/2, 2] cosines and sines -> [B, N, C]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        on_cpu = qkv.device.type == "cpu"
        if on_cpu and qkv.dtype == torch.bfloat16:
            # The CPU kernel's backward is slower in bf16 than in fp32: 1.3 x at 197 tokens, 7 x
            # at 17. And what is turned in fp32 need not be rounded.
            qkv = qkv.float()
        # One unbind: its gradient is one stack, where slices would each fill a whole tensor.
        q, k, v = qkv.unbind(2)  # [B, N, H, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if turns is not None:
            q, k = turn(q, turns[:, None]), turn(k, turns[:, None])
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, N, D]
        with no_autocast(q.device) if on_cpu else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(q, k, v)
        if on_cpu:
            out = out.to(self.proj.weight.dtype)  # Weights in bf16 take no fp32 without autocast.
        return self.proj(out.transpose(1, 2).flatten(2))


class _GeluTanh(torch.autograd.Function):
    """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is the tanh form in other words."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out, slope = torch.empty_like(x), 2 * math.sqrt(2 / math.pi)
        exact = torch.promote_types(x.dtype, torch.float32)
        first = torch.tensor(slope, dtype=exact)
        # In chunks, whose copies stay in the cache.
        size = torch.get_num_threads() << 18
        chunks = zip(x.reshape(-1).split(size), out.view(-1).split(size), strict=True)
        for part, into in chunks:
            wide = part.to(exact)
            inner = into if x.dtype == exact else torch.empty_like(wide)
            torch.addcmul(first, wide, wide, value=slope * 0.044715, out=inner)
            torch.mul(inner.mul_(wide).sigmoid_(), wide, out=into)
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad[0], *ctx.saved_tensors, approximate="tanh")


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation. PyTorch's own takes twice as long on a CPU."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _GeluTanh.apply(x.contiguous())
    return F.gelu(x, approximate="tanh")


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, gelu: Gelu = "none") -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.fc2(self.fc1(x, self.gelu))


class PatchEmbed(nn.Module):
    """Image to patch tokens by a strided convolution."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, h*patch, w*patch] -> [B, h*w, C], row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """The DeiT's: pre-norm, with layer scale and stochastic depth."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, init_scale: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_scale))
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, turns: Tensor | None, keep: Tensor | None) -> Tensor:
        """One block.

        Args:
            x: [B, N, C].
            turns: [N, D/2, 2] cosines and sines, None without RoPE.
            keep: [2, B], 0 where a sample skips the branch, else 1 / (1 - drop path rate).

        Returns:
            [B, N, C].
        """
        gamma_1, gamma_2 = self.gamma_1, self.gamma_2
        if keep is not None:
            gamma_1, gamma_2 = (
                gamma * on[:, None, None]
                for gamma, on in zip((gamma_1, gamma_2), keep, strict=True)
            )  # [B, 1, C]
        x = torch.addcmul(x, self.attn(self.norm1(x), turns), gamma_1)
        return torch.addcmul(x, self.mlp(self.norm2(x)), gamma_2)
