"""Kernels in Triton, for GPUs: the rotation of q and k, and adaptive layer norm.

`kernels.py` says when they are used. With TRITON_INTERPRET=1, set before this file is imported,
they run on a CPU.

Bytes moved by the rotation, in units of q (B * N * C elements): the forward pass reads and writes
q and k, 4 units; v stays a view of the projection. The backward pass writes the packed gradient of
the projection from its three parts. That is 6 units with and without a rotation, so the rotation
adds none. For DeiT-S, 256 images, in bf16 a unit is 39 MB, and 12 blocks move 1.9 GB more per step
than without RoPE: 0.4 ms at the 4.8 TB/s of an H200's data sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def _rotate(kernel: Any, tensors: Sequence[Tensor], table: Tensor, strides: Sequence[int]) -> None:
    """Runs a kernel of the rotation on its tensors, the last of which is a result."""
    batch, num_tokens, *_, heads, head_dim = tensors[-1].shape
    num_rows, width = batch * num_tokens, heads * head_dim
    num_tiles = triton.cdiv(num_rows, ROWS) * triton.cdiv(width, COLUMNS)
    sizes = (width, head_dim, ROWS, COLUMNS)
    _launch(kernel, num_tiles, *tensors, table.contiguous(), num_rows, num_tokens, *strides, *sizes)


def _launch(kernel: Any, num_programs: int, *args: Any) -> None:
    """Runs a kernel on the device of its first tensor."""
    if IN_GRAPHS:
        kernel = wrap_triton(kernel)
    with torch.cuda.device_of(args[0]):
        kernel[(num_programs,)](*args)


def _rotate_qk(qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    q, k = _new_qk(qkv, cos_sin)
    _rotate(_forward, (qkv, q, k), cos_sin, qkv.stride()[:-1])
    return q, k


def _new_qk(qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, _, *heads = qkv.shape
    return qkv.new_empty(batch, num_tokens, *heads), qkv.new_empty(batch, num_tokens, *heads)


def _rotate_back(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor) -> Tensor:
    if q.stride(-1) != 1 or not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    qkv = _new_qkv(q, k, v, cos_sin)
    _rotate(_backward, (q, k, v, qkv), cos_sin, q.stride()[:-1])
    return qkv


def _new_qkv(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], 3, *q.shape[2:])


IN_GRAPHS = isinstance(_forward, triton.runtime.JITFunction)
"""Whether a compiled graph calls the kernels themselves, and plans their memory. The interpreter
cannot be traced: with it the graph calls operators that it does not look into."""


def _operator(function: Callable[..., Any], results: Callable[..., Any]) -> Any:
    """`spiralrope::NAME`, which torch.compile knows; `results` gives its results, not computed."""
    name = f"spiralrope::{function.__name__.strip('_')}"
    if IN_GRAPHS:
        return triton_op(name, function, mutates_args=())
    operator = custom_op(name, function, mutates_args=())
    operator.register_fake(results)
    return operator


rotate_qk = _operator(_rotate_qk, _new_qk)
rotate_back = _operator(_rotate_back, _new_qkv)


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


@triton.jit
def _add(a, b):
    # Not `tl.sum`: the interpreter has it only if chosen before Triton is imported.
    return a + b


@triton.jit
def _modulated(  # noqa: PLR0913
    x,
    shift,
    scale,
    out,
    num_tokens,
    of_batch,  # stride of shift and scale
    eps: tl.constexpr,  # Inductor passes other numbers as float64, and computes in it
    width: tl.constexpr,  # C
    columns: tl.constexpr,  # at least C
):
    row, column = tl.program_id(0), tl.arange(0, columns)
    inside = column < width
    at = row.to(tl.int64) * width + column
    of = (row // num_tokens).to(tl.int64) * of_batch + column
    values = tl.load(x + at, mask=inside, other=0.0)
    centred = tl.where(inside, values - tl.reduce(values, 0, _add) / width, 0.0)
    normalised = centred * tl.rsqrt(tl.reduce(centred * centred, 0, _add) / width + eps)
    factor = 1 + tl.load(scale + of, mask=inside, other=0.0)
    modulated = tl.load(shift + of, mask=inside, other=0.0) + normalised * factor
    tl.store(out + at, modulated.to(out.dtype.element_ty), mask=inside)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if shift.stride(-1) != 1 or shift.stride() != scale.stride():
        shift, scale = shift.contiguous(), scale.contiguous()
    x, out = x.contiguous(), _new_modulated(x, shift, scale, eps, dtype)
    batch, num_tokens, width = x.shape
    sizes = (width, triton.next_power_of_2(width))
    rest = (num_tokens, shift.stride(0), eps)
    _launch(_modulated, batch * num_tokens, x, shift, scale, out, *rest, *sizes)
    return out


def _new_modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


modulate = _operator(_modulate, _new_modulated)
"""`(shift + (1 + scale) * layer_norm(x)).to(dtype)`, without a backward pass, in one pass over the
memory: x [B, N, C], shift and scale [B, 1, C] float32 -> [B, N, C]."""
