"""q and k of a packed projection rotated in one pass over the memory, for GPUs, in Triton.

`kernels.rotate_qkv` uses it where `kernels.has_rotary_kernel` says so. With TRITON_INTERPRET=1, set
before this file is imported, it runs on a CPU.

Bytes moved, in units of q (B * N * C elements): the forward pass reads and writes q and k, 4 units;
v stays a view of the projection. The backward pass writes the packed gradient of the projection
from its three parts. That is 6 units with and without a rotation, so the rotation adds none. For
DeiT-S, 256 images, in bf16 a unit is 39 MB, and 12 blocks move 1.9 GB more per step than without
RoPE: 0.4 ms at the 4.8 TB/s of an H200's data sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

ROWS, COLUMNS = 16, 128
"""Tokens and channels of a tile: 16 elements of q and of k for each of 128 threads."""


@triton.jit
def _rotated(x, cos, sin):
    """Tiles [rows, columns], cos and sin [rows, columns / 2] -> [rows, columns] float32."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x.to(tl.float32), (rows, columns // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (rows, columns))


@triton.jit
def _place(num_rows, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Rows (tokens of all images) and columns (channels of all heads) of this program's tile."""
    across: tl.constexpr = (width + columns - 1) // columns
    row = tl.program_id(0) // across * rows + tl.arange(0, rows)
    column = tl.program_id(0) % across * columns + tl.arange(0, columns)
    return row, column, (row < num_rows)[:, None] & (column < width)[None, :]


@triton.jit
def _cos_sin(table, token, channel, inside, head_dim: tl.constexpr):
    """Two tiles [rows, columns / 2] of the table [num_tokens, head_dim / 2, 2]."""
    at = (token * head_dim)[:, None] + channel[None, :]
    both = tl.load(table + at, mask=inside, other=0.0)
    rows: tl.constexpr = both.shape[0]
    columns: tl.constexpr = both.shape[1]
    return tl.split(tl.reshape(both, (rows, columns // 2, 2)))


@triton.jit
def _forward(  # noqa: PLR0913
    qkv,
    q,
    k,
    table,
    num_rows,  # B * num_tokens
    num_tokens,
    of_batch,  # strides of qkv
    of_token,
    of_part,
    of_head,
    width: tl.constexpr,  # H * head_dim
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    row, column, inside = _place(num_rows, width, rows, columns)
    batch, token = (row // num_tokens).to(tl.int64), row % num_tokens
    head, channel = column // head_dim, column % head_dim
    cos, sin = _cos_sin(table, token, channel, inside, head_dim)
    at = (batch * of_batch + token * of_token)[:, None] + (head * of_head + channel)[None, :]
    to = (row.to(tl.int64) * width)[:, None] + column[None, :]
    rotated = _rotated(tl.load(qkv + at, mask=inside, other=0.0), cos, sin)
    tl.store(q + to, rotated.to(q.dtype.element_ty), mask=inside)
    rotated = _rotated(tl.load(qkv + at + of_part, mask=inside, other=0.0), cos, sin)
    tl.store(k + to, rotated.to(k.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # noqa: PLR0913
    q,
    k,
    v,
    qkv,
    table,
    num_rows,  # B * num_tokens
    num_tokens,
    of_batch,  # strides of q, k and v
    of_token,
    of_head,
    width: tl.constexpr,  # H * head_dim
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    row, column, inside = _place(num_rows, width, rows, columns)
    batch, token = (row // num_tokens).to(tl.int64), row % num_tokens
    head, channel = column // head_dim, column % head_dim
    cos, sin = _cos_sin(table, token, channel, inside, head_dim)
    at = (batch * of_batch + token * of_token)[:, None] + (head * of_head + channel)[None, :]
    to = (row.to(tl.int64) * (3 * width))[:, None] + column[None, :]
    rotated = _rotated(tl.load(q + at, mask=inside, other=0.0), cos, -sin)
    tl.store(qkv + to, rotated.to(qkv.dtype.element_ty), mask=inside)
    rotated = _rotated(tl.load(k + at, mask=inside, other=0.0), cos, -sin)
    tl.store(qkv + to + width, rotated.to(qkv.dtype.element_ty), mask=inside)
    tl.store(qkv + to + 2 * width, tl.load(v + at, mask=inside, other=0.0), mask=inside)


def _launch(
    kernel: Any, tensors: Sequence[Tensor], cos_sin: Tensor, strides: Sequence[int]
) -> None:
    """Runs a kernel for `tensors`, of which the last is a result [B, N, ..., H, D]."""
    batch, num_tokens, *_, heads, head_dim = tensors[-1].shape
    num_rows, width = batch * num_tokens, heads * head_dim
    grid = (triton.cdiv(num_rows, ROWS) * triton.cdiv(width, COLUMNS),)
    if IN_GRAPHS:
        kernel = wrap_triton(kernel)
    with torch.cuda.device_of(tensors[0]):
        sizes = (width, head_dim, ROWS, COLUMNS)
        kernel[grid](*tensors, cos_sin.contiguous(), num_rows, num_tokens, *strides, *sizes)


def _rotate_qk(qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    q, k = _new_qk(qkv, cos_sin)
    _launch(_forward, (qkv, q, k), cos_sin, qkv.stride()[:-1])
    return q, k


def _new_qk(qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, _, *heads = qkv.shape
    return qkv.new_empty(batch, num_tokens, *heads), qkv.new_empty(batch, num_tokens, *heads)


def _rotate_back(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor) -> Tensor:
    if q.stride(-1) != 1 or not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    qkv = _new_qkv(q, k, v, cos_sin)
    _launch(_backward, (q, k, v, qkv), cos_sin, q.stride()[:-1])
    return qkv


def _new_qkv(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], 3, *q.shape[2:])


IN_GRAPHS = isinstance(_forward, triton.runtime.JITFunction)
"""Whether a compiled graph calls the kernels themselves, and plans their memory. The interpreter
cannot be traced: with it the graph calls operators that it does not look into."""
_NAMES = ("spiralrope::rotate_qk", "spiralrope::rotate_back")
if IN_GRAPHS:
    rotate_qk = triton_op(_NAMES[0], _rotate_qk, mutates_args=())
    rotate_back = triton_op(_NAMES[1], _rotate_back, mutates_args=())
else:
    rotate_qk = custom_op(_NAMES[0], _rotate_qk, mutates_args=())
    rotate_back = custom_op(_NAMES[1], _rotate_back, mutates_args=())
    rotate_qk.register_fake(_new_qk)
    rotate_back.register_fake(_new_qkv)


class _RotateQkv(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation of the gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_sin)
        return *rotate_qk(qkv, cos_sin), qkv.select(2, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return rotate_back(*grads, *ctx.saved_tensors), None


# One node for dynamo: torch 2.6 cannot trace an autograd.Function with gradient checkpointing.
@torch.compiler.allow_in_graph
def rotate(qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates q and k of a packed projection.

    Args:
        qkv: [B, N, 3, H, D] bf16, fp16 or fp32, computed in float32.
        cos_sin: float32 cosines and sines [N, D/2, 2].

    Returns:
        q, k, and v, which is a view: [B, N, H, D] in the dtype of qkv.
    """
    return _RotateQkv.apply(qkv, cos_sin)
