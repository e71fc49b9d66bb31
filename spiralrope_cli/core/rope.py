"""Spiral RoPE: each group of channels encodes the position along its own direction.

Legend: B batch, H heads, N tokens, D channels of a head, F = D/4 frequencies per half,
R = `rotate`, K = 2R directions, (h, w) the grid of patch tokens in row-major order.

The channels of one head, with D = 32 and R = 2 (one letter per chunk of 4 channels; chunk c has
direction c mod R, so `a` follows the axes and `b` the axes rotated by 45 degrees):

    channel    0       4       8       12    | 16      20      24      28
    chunk      a       b       a       b     | a       b       a       b
    position   y cos a + x sin a             | x cos a - y sin a
    frequency  w0 w1   w2 w3   w4 w5   w6 w7 | w0 w1   w2 w3   w4 w5   w6 w7

(y, x) is the row and the column of a patch, from the centre of the grid; a is the angle of the
direction. At a = 0 the first half of a head has the row, the second half the column.

Source: "Spiral RoPE: Rotate Your Rotary Positional Embeddings in the 2D Plane",
arXiv 2602.03227.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spiralrope_cli.core.config.models import MIN_FREQ_IS_SET, RopeConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.kernels import apply_rotary_complex

Grid = int | tuple[int, int]
Device = torch.device | str
MIXED_THETA = 10.0
"""Base of the first frequencies of RoPE-Mixed, as published."""


def frequencies(config: RopeConfig, head_dim: int, device: Device = "cpu") -> Tensor:
    """Distinct frequencies in radians per patch, as the published files store them in `freqs`.

    Returns:
        [D/4] float64, or [D/(4R)] with `same_theta`; highest first for `lang`, lowest first
        for `pixel`.

    Raises:
        ConfigError: head_dim does not fit the options.
    """
    config.check_head_dim(head_dim)
    num = head_dim // 4
    exact: dict[str, Any] = {"dtype": torch.float64, "device": device}
    if config.freqs_for == "pixel":
        return math.pi * torch.linspace(1.0, config.max_freq / 2, num, **exact)
    highest = config.max_freq_lang
    if config.rotate == 0:
        exponent = torch.arange(num, **exact) / num
        return highest * config.theta**-exponent
    if config.same_theta:
        num //= config.rotate
    lowest = config.min_freq_lang
    # With a single frequency there is no ratio to span, and it is the highest.
    if lowest < MIN_FREQ_IS_SET or num == 1:
        lowest = highest / config.theta ** ((num - 1) / num)
    falling = torch.arange(num - 1, -1, -1, **exact) / max(num - 1, 1)
    series = lowest * (highest / lowest) ** falling
    num_cut = int(num * config.truncate_percentage)
    series[num - num_cut :] = 0.0
    return series


def pair_layout(
    config: RopeConfig, head_dim: int, device: Device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Frequency and direction of each channel pair (2i, 2i + 1) of a head.

    Returns:
        frequency [D/2] float64 in radians per patch, direction angle [D/2] float64 in radians,
        and [D/2] bool, True for the pairs of the first half of the head.
    """
    rotate = max(config.rotate, 1)
    channel = torch.arange(0, head_dim, 2, device=device)
    in_first_half = channel < head_dim // 2
    in_half = channel % (head_dim // 2)
    index = in_half // 2
    if config.same_theta and config.rotate >= 1 and config.freqs_for == "lang":
        index = (4 * (in_half // 4 // rotate) + in_half % 4) // 2
    # Chunks are counted over the whole head, as in the published code: if D/2 is not a multiple
    # of 4, one chunk has channels in both halves.
    direction = (channel // 4) % rotate
    angle = direction.double() * (math.pi / 2 / rotate)
    return frequencies(config, head_dim, device)[index], angle, in_first_half


def projections(grid: tuple[int, int], angle: Tensor) -> tuple[Tensor, Tensor]:
    """Position of every token along each direction, in patches from the grid's centre.

    Args:
        grid: patches as (rows, columns).
        angle: [P] float64 direction angles in radians.

    Returns:
        y cos a + x sin a, of the first half of a head, and x cos a - y sin a, of the second half;
        [h*w, P] each. At angle 0 they are row and column.
    """
    rows, columns = grid
    y = torch.arange(rows, dtype=angle.dtype, device=angle.device) - (rows - 1) / 2
    x = torch.arange(columns, dtype=angle.dtype, device=angle.device) - (columns - 1) / 2
    y, x = (axis.reshape(-1, 1) for axis in torch.meshgrid(y, x, indexing="ij"))
    sin, cos = angle.sin(), angle.cos()
    return cos * y + sin * x, cos * x - sin * y


def build_angles(
    grid: tuple[int, int],
    head_dim: int,
    config: RopeConfig,
    pretrain_grid: tuple[int, int],
    device: Device = "cpu",
) -> Tensor:
    """Angle by which each channel pair of each token is rotated.

    Along a rotated axis the corners of the grid have positions beyond (side - 1) / 2. `clamped`
    limits them to that value, as the published code does; `exact` is the paper's formula.

    Args:
        grid: patches now, as (rows, columns).
        head_dim: channels per head, a multiple of 4.
        config: the options.
        pretrain_grid: patches in training, as (rows, columns); `interpolate` scales positions
            into this range.
        device: of the result.

    Returns:
        [h*w, D/2] float64 radians, tokens in row-major order.

    Raises:
        ConfigError: head_dim does not fit the options, or a grid side is not positive.
    """
    if min(*grid, *pretrain_grid) < 1:
        raise ConfigError(f"a grid of {grid} patches (trained at {pretrain_grid}) has no tokens")
    frequency, angle, in_first_half = pair_layout(config, head_dim, device)
    halves = []
    for pos, side, trained in zip(projections(grid, angle), grid, pretrain_grid, strict=True):
        half_extent = (side - 1) / 2
        if config.projection == "clamped":
            pos = pos.clamp(-half_extent, half_extent)
        factor = trained / side if config.scaling == "interpolate" else 1.0
        halves.append((pos + half_extent) * factor)
    return torch.where(in_first_half, halves[0], halves[1]) * frequency


def first_mixed_frequencies(head_dim: int, depth: int, num_heads: int) -> Tensor:
    """Frequencies from which RoPE-Mixed (arXiv 2403.13298) starts.

    Those of each head are of axial RoPE, theta^(-4j/D) with theta = 10, along two perpendicular
    directions at a random angle.

    Returns:
        [2, depth, H, D/2] float64 on the CPU, in radians per patch along columns and rows.
    """
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    magnitude = MIXED_THETA ** -(torch.arange(head_dim // 4, **exact) / (head_dim // 4))
    angle = 2 * math.pi * torch.rand(depth, num_heads, 1, **exact)
    angle = torch.cat((angle, angle + math.pi / 2), dim=-1)[..., None]  # [depth, H, 2, 1]
    return torch.stack((angle.cos() * magnitude, angle.sin() * magnitude)).flatten(3)


def mixed_angles(
    freqs: Tensor, grid: tuple[int, int], config: RopeConfig, pretrain_grid: tuple[int, int]
) -> Tensor:
    """Angle of each channel pair of RoPE-Mixed: fx x + fy y at column x and row y, from 0.

    Args:
        freqs: [2, depth, H, D/2] in radians per patch along columns and rows.
        grid: patches now, as (rows, columns).
        config: `scaling` is used.
        pretrain_grid: patches in training, as (rows, columns).

    Returns:
        [depth, h*w, H, D/2] radians in the dtype of `freqs`, tokens in row-major order.
    """
    y, x = (torch.arange(side, dtype=freqs.dtype, device=freqs.device) for side in grid)
    if config.scaling == "interpolate":
        y, x = y * (pretrain_grid[0] / grid[0]), x * (pretrain_grid[1] / grid[1])
    y, x = (axis.reshape(-1, 1, 1) for axis in torch.meshgrid(y, x, indexing="ij"))
    # Not by a matmul, which autocast would compute in bf16.
    return x * freqs[0, :, None] + y * freqs[1, :, None]


def leaves_grid(grid: tuple[int, int], config: RopeConfig, head_dim: int) -> Tensor:
    """[h*w, D/2] bool: True where `projection="clamped"` changes the position."""
    _, angle, in_first_half = pair_layout(config, head_dim)
    beyond = [
        pos.abs() > (side - 1) / 2 + 1e-9  # the tolerance covers the rounding of sin and cos
        for pos, side in zip(projections(grid, angle), grid, strict=True)
    ]
    return torch.where(in_first_half, beyond[0], beyond[1])


def clamped_fraction(grid: tuple[int, int], config: RopeConfig, head_dim: int) -> float:
    """Fraction of all positions that `projection="clamped"` changes, in [0, 1]."""
    return leaves_grid(grid, config, head_dim).double().mean().item()


def change_from_axial(
    grid: tuple[int, int],
    head_dim: int,
    config: RopeConfig,
    pretrain_grid: tuple[int, int] | None = None,
) -> float:
    """How much of a rotation differs from axial RoPE: 0 for none.

    The root mean square, over patches and random queries q, of |rotated q - axially rotated q|/|q|.
    `pretrain_grid` is the grid by default.
    """
    axial = replace(config, rotate=min(config.rotate, 1))
    angle, along_axes = (
        build_angles(grid, head_dim, each, pretrain_grid or grid) for each in (config, axial)
    )
    # Two rotations of a pair by angles that differ by d are |exp(id) - 1| apart.
    return (2 - 2 * (angle - along_axes).cos()).mean().sqrt().item()


def apply_rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates each channel pair (a, b): a' = a cos - b sin, b' = b cos + a sin.

    Computed in float32, or in float64 for float64 x.

    Args:
        x: [..., D] floating point.
        cos_sin: float32 cosines and sines, broadcastable to [..., D/2, 2].

    Returns:
        [..., D] in the dtype of x.
    """
    if not torch.compiler.is_compiling() and not cos_sin.requires_grad:
        return apply_rotary_complex(x, cos_sin)
    # torch.compile fuses the plain formula; it does not fuse complex products. Learned frequencies
    # need its gradient.
    x_fp32 = x if x.dtype == torch.float64 else x.float()
    (a, b), (cos, sin) = x_fp32.unflatten(-1, (-1, 2)).unbind(-1), cos_sin.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


class SpiralRoPE(nn.Module):
    """Rotary position embedding with many directions, for q and k of any attention over a 2D grid.

    It has no parameters and adds nothing to the state dict. Cosines and sines are computed once
    per grid and device, in float64, and stored in float32: in bf16 the angles of neighbouring
    patches would be rounded to the same value.

    Args:
        head_dim: channels per head, a multiple of 4.
        config: the options.
        pretrain_grid: patch grid in training, as a side or (rows, columns).

    Raises:
        ConfigError: head_dim does not fit the options.
    """

    def __init__(
        self, head_dim: int, config: RopeConfig | None = None, pretrain_grid: Grid = 14
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.config = config if config is not None else RopeConfig()
        if not self.config.enabled:
            raise ConfigError(
                "RopeConfig(enabled=False) leaves nothing to rotate", "leave SpiralRoPE out"
            )
        if self.config.mixed:
            raise ConfigError(
                "SpiralRoPE has no learned frequencies", "use models.mixed_rope.MixedRoPE"
            )
        self.config.check_head_dim(head_dim)
        self.pretrain_grid = to_2tuple(pretrain_grid)
        self._cos_sin: dict[tuple[tuple[int, int], int, torch.device], Tensor] = {}

    def cos_sin(self, grid: Grid, prefix_tokens: int, device: torch.device) -> Tensor:
        """[prefix + h*w, D/2, 2] float32 cosines and sines; prefix tokens have the identity."""
        key = (to_2tuple(grid), prefix_tokens, device)
        if key not in self._cos_sin:
            if torch.compiler.is_compiling():
                # A part of the graph: a table kept for later would be compiled for once more.
                return self._new_table(*key, made_on=device)
            # An inference tensor in the cache would break a later backward pass. On the CPU, so
            # that the table is the same on every device; plans need its shape alone.
            where = "meta" if device.type == "meta" else "cpu"
            with torch.inference_mode(False):
                self._cos_sin[key] = self._new_table(*key, made_on=where)
        return self._cos_sin[key]

    def _new_table(
        self, grid: tuple[int, int], prefix_tokens: int, device: torch.device, made_on: Device
    ) -> Tensor:
        angle = build_angles(grid, self.head_dim, self.config, self.pretrain_grid, made_on)
        angle = torch.cat((angle.new_zeros(prefix_tokens, angle.shape[1]), angle))
        return torch.stack((angle.cos(), angle.sin()), dim=-1).to(torch.float32).to(device)

    def tables(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every channel's angle, for kernels of your own.

        Returns:
            two float32 tensors [h*w, D] on the CPU; both channels of a pair have the same values.
        """
        cos_sin = self.cos_sin(grid, 0, torch.device("cpu"))
        cos, sin = cos_sin.repeat_interleave(2, dim=1).unbind(-1)
        return cos, sin

    def forward(self, x: Tensor, grid: Grid | None = None, prefix_tokens: int = 0) -> Tensor:
        """Rotates queries or keys.

        Args:
            x: [B, H, prefix_tokens + h*w, D].
            grid: patch grid as a side or (rows, columns); by default `pretrain_grid`.
            prefix_tokens: number of leading tokens that are not rotated, such as a class token.

        Returns:
            the same shape and dtype.

        Raises:
            ConfigError: the token count is not prefix_tokens + h*w, or D differs.
        """
        rows, columns = to_2tuple(grid if grid is not None else self.pretrain_grid)
        if x.shape[-2] != prefix_tokens + rows * columns or x.shape[-1] != self.head_dim:
            raise ConfigError(
                f"{x.shape[-2]} tokens of {x.shape[-1]} channels do not fit a grid of "
                f"{rows}x{columns} with {prefix_tokens} prefix tokens and {self.head_dim} channels"
            )
        return apply_rotary(x, self.cos_sin((rows, columns), prefix_tokens, x.device))

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"head_dim={self.head_dim}, pretrain_grid={self.pretrain_grid}, {self.config}"


def to_2tuple(size: Grid) -> tuple[int, int]:
    """A side or (rows, columns) -> (rows, columns)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
