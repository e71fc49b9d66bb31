"""How tests compare what runs leave behind."""

from __future__ import annotations

import contextlib
import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def same_tensors(one, other):
    """Whether two nested structures of tensors and numbers are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tensors(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(
            same_tensors(a, b) for a, b in zip(one, other, strict=True)
        )
    return one == other


def relative_distance(one, other):
    """L2 distance of two dicts of tensors over the length of the second."""
    off = sum((one[name] - other[name]).double().square().sum() for name in other) ** 0.5
    return (off / sum(other[name].double().square().sum() for name in other) ** 0.5).item()


@contextlib.contextmanager
def casts_of_weights(model):
    """Operators that copy a parameter to another dtype, as autocast does in every call."""
    weights, casts = {parameter.data_ptr() for parameter in model.parameters()}, []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            if operator.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to):
                casts.extend([operator] * (args[0].data_ptr() in weights and out is not args[0]))
            return out

    with Record():
        yield casts


def rotation_formula(qkv, cos_sin):
    """q and k of a packed projection rotated in the dtype of the table, and v."""
    (cos, sin), (q, k, v) = cos_sin[:, None].unbind(-1), qkv.unbind(2)
    pairs = [each.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1) for each in (q, k)]
    rotated = [torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1) for a, b in pairs]
    return *(each.flatten(-2).to(qkv.dtype) for each in rotated), v


def rotation_results(rotate, qkv, cos_sin, grads):
    """q, k, v and the gradient of the projection."""
    qkv = qkv.detach().requires_grad_()
    out = rotate(qkv, cos_sin)
    grads = [grad.to(each.dtype) for grad, each in zip(grads, out, strict=True)]
    torch.autograd.backward(out, grads)
    return *out, qkv.grad


def modulation_inputs(size, device="cpu"):
    """x [B, N, C], shift and scale [B, 1, C] as a block of a DiT has them: float32."""
    batch, tokens, width = size
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(batch, tokens, width, generator=draw) * 3 + 1
    signals = torch.randn(batch, 6, 1, width, generator=draw)
    return x.to(device), *signals.to(device).unbind(1)[1:3]


def modulation_formula(x, shift, scale, eps):
    """Adaptive layer norm."""
    return shift + (1 + scale) * torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)


MODULATION_SIZES = [(2, 5, 36), (3, 1, 128), (1, 1, 1152)]
ROTATION_SIZES = [(2, 17, 3, 64), (1, 1, 1, 4), (3, 50, 2, 36), (2, 16, 5, 32), (1, 33, 4, 72)]
"""Batch, tokens, heads and channels; none fills the tiles of the kernel."""


def rotation_inputs(size, dtype, device="cpu"):
    """Projection, gradients of q, k and v, table in float64; the first token is not rotated."""
    batch, tokens, heads, head_dim = size
    draw = {"generator": torch.Generator().manual_seed(head_dim), "dtype": torch.float64}
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, **draw)
    grads = torch.randn(3, batch, tokens, heads, head_dim, **draw)
    angle = torch.randn(tokens, head_dim // 2, **draw) * 3
    angle[0] = 0
    cos_sin = torch.stack((angle.cos(), angle.sin()), dim=-1)
    return qkv.to(device, dtype), grads.to(device, dtype), cos_sin.to(device)


def read_pointer(folder, name):
    """What `best.json` or `last.json` of a run says."""
    return json.loads((folder / "checkpoints" / f"{name}.json").read_text())
