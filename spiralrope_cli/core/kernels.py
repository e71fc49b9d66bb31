"""Faster forms of plain PyTorch expressions.

Each docstring gives the plain expression, and on which device the fast form is faster, and why.
Code that depends on the device for speed alone is in this file only; to understand `models/` and
`rope.py`, the plain expressions are enough.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

TRITON_DEVICE = "cuda"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Gelu = Literal["none", "tanh"]
"""The values of `F.gelu(approximate=)`: exact, or the tanh approximation."""


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a matmul with this weight: that of autocast where it is on, else the weight's.

    What feeds a matmul is written in it, once; otherwise autocast casts it in another pass.
    """
    kind = weight.device.type
    if kind == "meta" or weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Turns autocast off; does nothing on the meta device, which has no autocast."""
    # `is_autocast_available` would be the usual test; torch.compile before 2.12 cannot trace it.
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Linear(nn.Linear):
    """`nn.Linear`, then `F.gelu(approximate=gelu)` if `gelu` is given.

    On a CPU, inference calls oneDNN's matmul with fused GELU, as torch.compile does. In fp32 on
    AMD CPUs this takes half the time of MKL, and less for few rows (a quarter to a half). On a GPU
    with weights in bf16, cuBLAS fuses the GELU by tanh, which spares a pass over the hidden layer.
    These operators have no backward, so training uses PyTorch's.
    """

    def forward(self, input: Tensor, gelu: Gelu | None = None) -> Tensor:
        """[..., in] -> [..., out], under autocast in its dtype."""
        if (dtype := _onednn_dtype(input, self.weight)) is not None:
            given = (each.to(dtype) for each in (input, self.weight, self.bias))
            after = "none" if gelu is None else "gelu"
            return torch.ops.mkldnn._linear_pointwise(*given, after, [], gelu or "")
        if gelu == "tanh" and _cublas_fuses_gelu(input, self.weight):
            rows = input.flatten(0, -2)
            out = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
            return out.unflatten(0, input.shape[:-1])
        out = super().forward(input)
        if gelu is None:
            return out
        return gelu_tanh(out) if gelu == "tanh" else F.gelu(out)


def _onednn_dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype in which oneDNN computes this matmul; None: use PyTorch's `linear`."""
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


def _cublas_fuses_gelu(input: Tensor, weight: Tensor) -> bool:
    """Not in fp32: its GELU is an approximation of the accuracy of bf16."""
    infers_on_gpu = input.device.type == "cuda" and not torch.is_grad_enabled()
    one_dtype = input.dtype == weight.dtype == matmul_dtype(weight)
    return infers_on_gpu and one_dtype and weight.dtype in (torch.bfloat16, torch.float16)


# `FlopCounterMode` does not know these operators.
flop_registry.setdefault(torch.ops.aten._addmm_activation, flop_registry[torch.ops.aten.addmm])
if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        """FLOPs from shapes: [..., in], [out, in]."""
        return 2 * math.prod(x) * weight[0]


def gelu_tanh(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")`; on a CPU in half the time, in chunks that fit the cache."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _GeluTanh.apply(x.contiguous())
    return F.gelu(x, approximate="tanh")


class _GeluTanh(torch.autograd.Function):
    """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), as (1 + tanh(z)) / 2 = sigmoid(2z)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out, slope = torch.empty_like(x), 2 * math.sqrt(2 / math.pi)
        exact = torch.promote_types(x.dtype, torch.float32)
        first = torch.tensor(slope, dtype=exact)
        size = torch.get_num_threads() << 18  # 1 MiB of float32 per thread
        chunks = zip(x.reshape(-1).split(size), out.view(-1).split(size), strict=True)
        for part, into in chunks:
            x_fp32 = part.to(exact)
            inner = into if x.dtype == exact else torch.empty_like(x_fp32)
            torch.addcmul(first, x_fp32, x_fp32, value=slope * 0.044715, out=inner)
            torch.mul(inner.mul_(x_fp32).sigmoid_(), x_fp32, out=into)
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad[0], *ctx.saved_tensors, approximate="tanh")


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """`F.layer_norm(x, x.shape[-1:], eps=eps)`: [..., C] -> [..., C], without parameters.

    On a CPU ones and zeros are passed as weight and bias: without them the kernel takes twice as
    long.
    """
    channels, on_cpu = x.shape[-1:], x.device.type == "cpu"
    one, zero = (x.new_ones(channels), x.new_zeros(channels)) if on_cpu else (None, None)
    return F.layer_norm(x, channels, one, zero, eps)


def rms_norm(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`(x / (rms(x) + eps) * scale).to(dtype)`: x [..., C] float32 or float64, scale [C].

    In eager mode on a GPU with its own backward pass, which moves half the bytes of autograd's,
    and without a float32 copy of the result.
    """
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, scale, eps, dtype)
    return (x * (_rms(x) + eps).reciprocal() * scale).to(dtype)


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5


class _RMSNorm(torch.autograd.Function):
    """y = s x r with r = 1 / (rms + eps), where d rms / dx = x / (C rms)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rms = _rms(x)
        r = (rms + eps).reciprocal()
        ctx.save_for_backward(x, scale, rms, r)
        return torch.mul(x * r, scale, out=x.new_empty(x.shape, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, rms, r = ctx.saved_tensors
        scale = scale.to(x.dtype)
        with no_autocast(x.device):
            product = (grad[0] * x).flatten(0, -2)  # [tokens, C]
            grad_scale = product.t().mv(r.flatten())
            along = product.mv(scale).view_as(rms)
            factor = along * r.square() / (rms * -x.shape[-1])
            factor = torch.where(rms > 0, factor, 0)  # a token of zeros
            grad_x = torch.mul(grad[0], scale).mul_(r).addcmul_(x, factor)
        return grad_x, grad_scale, None, None


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """`x + branch * scale`: x and branch [B, N, C], scale [C] or [B, 1, C]; in the dtype of x.

    Under autocast a GPU would copy the branch to float32 first, and its backward pass would copy
    the gradient back to bf16: two passes over the tokens more each.
    """
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        return _AddScaled.apply(x, branch, scale)
    return torch.addcmul(x, branch, scale)


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(branch, scale)
        with no_autocast(x.device):
            return torch.addcmul(x, branch, scale)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        branch, scale = ctx.saved_tensors
        grad_branch = torch.mul(grad[0], scale, out=torch.empty_like(branch))
        return grad[0], grad_branch, (grad[0] * branch).sum_to_size(scale.shape)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`(shift + (1 + scale) * layer_norm(x, eps)).to(dtype)`: [B, N, C] by [B, 1, C] -> [B, N, C].

    Inference on a GPU in one Triton kernel. PyTorch's three move three times the bytes; Inductor's
    one takes three times what memory costs for the 1152 channels of a DiT-XL.
    """
    on_gpu = x.device.type == TRITON_DEVICE and x.dtype == torch.float32 and dtype in TRITON_DTYPES
    one_each = shift.shape == scale.shape == (len(x), 1, x.shape[-1])  # not one for all images
    if on_gpu and one_each and not torch.is_grad_enabled() and _triton_works(dtype):
        from spiralrope_cli.core import triton_kernels

        return triton_kernels.modulate(x, shift, scale, eps, dtype)
    return torch.addcmul(shift, layer_norm(x, eps), 1 + scale).to(dtype)


def fp32_on_cpu(qkv: Tensor) -> Tensor:
    """`qkv` for `attention` below: bf16 on a CPU becomes float32, anything else is unchanged.

    On a CPU the backward pass of attention is slower in bf16 than in fp32: 1.3 x with 197 tokens,
    7 x with 17. Besides, the fp32 result of the rotation need not be rounded.
    """
    return qkv.float() if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 else qkv


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention(q, k, v)`: [B, H, N, D] -> [B, H, N, D].

    Autocast is off on a CPU: it would cast the float32 of `fp32_on_cpu` back to bf16.
    """
    on_cpu = q.device.type == "cpu"
    with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


def apply_rotary_complex(x: Tensor, cos_sin: Tensor) -> Tensor:
    """`rope.apply_rotary`: a' = a cos - b sin, b' = b cos + a sin for each channel pair.

    In eager mode the formula reads the memory six times, and autograd stores x. A complex product
    reads it once in the forward and once in the backward pass, and stores no activation. This
    holds on any device.

    Args:
        x: [..., D] floating point, in any memory layout.
        cos_sin: float32, or float64 for float64 x; broadcastable to [..., D/2, 2].

    Returns:
        [..., D] in the dtype of x.
    """
    return _RotaryComplex.apply(x, cos_sin)


class _RotaryComplex(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sin)
        return _complex_product(x, torch.view_as_complex(cos_sin))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        cos_sin = torch.view_as_complex(ctx.saved_tensors[0])
        return _complex_product(grad[0], cos_sin.conj()), None


def _complex_product(x: Tensor, cos_sin: Tensor) -> Tensor:
    dtype, ours = x.dtype, x.dtype not in (torch.float32, torch.float64)
    if ours:
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
    elif x.stride(-1) != 1 or any(n % 2 for n in (*x.stride()[:-1], x.storage_offset())):
        # `view_as_complex` needs the two numbers of a pair next to each other, at an even offset.
        x = x.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    # The float32 copy was made here, so the product may overwrite it.
    product = pairs.mul_(cos_sin) if ours else pairs * cos_sin
    return torch.view_as_real(product).flatten(-2).to(dtype)


def rotate_qkv(qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rope.apply_rotary` of q and k: [B, N, 3, H, D], [N, D/2, 2] -> q, k and v, [B, N, H, D].

    One Triton kernel, forward and backward, where `has_rotary_kernel`. In bf16 it moves a fifth of
    the bytes that two complex products move; `triton_kernels.py` counts them.
    """
    from spiralrope_cli.core import triton_kernels

    return triton_kernels.rotate(qkv, cos_sin)


def has_rotary_kernel(qkv: Tensor, cos_sin: Tensor) -> bool:
    """Whether `rotate_qkv` can be used: on GPUs, where Triton works.

    Not for float64, for a table of each head, nor for one that needs a gradient.
    """
    one_table = cos_sin.shape == (qkv.shape[1], qkv.shape[4] // 2, 2)
    if not one_table or cos_sin.dtype != torch.float32 or cos_sin.requires_grad:
        return False
    if qkv.device.type != TRITON_DEVICE or qkv.dtype not in TRITON_DTYPES:
        return False
    return _triton_works(qkv.dtype)


def _triton_works(dtype: torch.dtype) -> bool:
    return _try_triton(dtype)


# torch.compile calls it and keeps the answer. This is `torch.compiler.assume_constant_result`,
# which needs 1.5 s to load; its only effect is this attribute.
_triton_works._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _try_triton(dtype: torch.dtype) -> bool:
    """Rotates a few numbers: Triton may be missing, or lack a C compiler or Python's headers."""
    try:
        given = torch.zeros(1, 2, 3, 1, 4, dtype=dtype, device=TRITON_DEVICE)
        rotate_qkv(given, torch.zeros(2, 2, 2, device=TRITON_DEVICE))
    except ImportError:
        return False
    except Exception as error:  # noqa: BLE001 - whatever Triton's compilers raise
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"networks are slower here, because Triton does not work: {why}", stacklevel=2
        )
        return False
    return True
