"""Rotary position embedding (Su et al., arXiv 2104.09864) and its long-context scalings, as pure functions.

A scaling changes frequencies only, never a weight: it is set at evaluation, or between phases of training.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryScaling:
    """Way to read rows longer than those trained on.

    `interpolation`: positions divided by the factor (Chen et al., arXiv 2306.15595).
    `ntk`: the base raised so that the lowest frequency is divided by the factor and the highest stays ("NTK-aware
        scaled RoPE", bloc97, 2023; Peng et al., arXiv 2309.00071, section 3.1).
    `dynamic_ntk`: ntk by the row's own length ("dynamically scaled RoPE", emozilla, 2023; in arXiv 2309.00071, section
        3.3): the factor is `factor` x length / trained_length - (factor - 1), and 1 up to the trained length.
    `yarn`: interpolation of the dimensions that turn less than once in the trained length, none of those that turn
        more than 32 times, a ramp between; attention sharpened by sqrt(1/t) = 0.1 ln(factor) + 1 on q and on k (arXiv
        2309.00071, sections 3.2 and 3.4). The ramp is linear in the number of turns, as in the paper's text.
    """

    kind: Literal["interpolation", "ntk", "dynamic_ntk", "yarn"]
    factor: float
    """Length to be read / trained length; at least 1, where it changes nothing (`dynamic_ntk`: nothing up to the
    trained length)."""
    trained_length: int
    """Positions of the rows that were trained on."""

    def __post_init__(self) -> None:
        if self.kind not in ("interpolation", "ntk", "dynamic_ntk", "yarn"):
            raise ValueError(
                f"there is no rotary scaling {self.kind!r}; there are interpolation, ntk, dynamic_ntk, yarn"
            )
        if not (math.isfinite(self.factor) and self.factor >= 1 and self.trained_length >= 1):
            raise ValueError(
                f"a rotary scaling needs factor >= 1 and trained_length >= 1, not {self.factor}, {self.trained_length}"
            )


def rotary_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return theta^(-2i/dim) for i = 0 .. dim/2 - 1, float32 [dim/2], in radians per position."""
    if dim % 2:
        raise ValueError(f"rotary embedding rotates pairs of dimensions, but the (sub-)head is {dim} wide")
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def scaled_frequencies(
    dim: int, theta: float, scaling: RotaryScaling, length: int, device: torch.device | None = None
) -> Tensor:
    """Return `rotary_frequencies` under a scaling, for rows of `length` positions; float32 [dim/2]."""
    factor, frequencies = scaling.factor, rotary_frequencies(dim, theta, device)
    if scaling.kind == "interpolation":
        return frequencies / factor
    if scaling.kind == "yarn":
        turns = scaling.trained_length * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor)
    if scaling.kind == "dynamic_ntk":
        factor = max(1.0, factor * length / scaling.trained_length - (factor - 1))
    if factor == 1 or dim == 2:  # one frequency is the highest: it stays
        return frequencies
    return rotary_frequencies(dim, theta * factor ** (dim / (dim - 2)), device)


def attention_sharpness(scaling: RotaryScaling | None) -> float:
    """Return what rotated q and k are each multiplied by: YaRN's sqrt(1/t), else 1."""
    return 0.1 * math.log(scaling.factor) + 1 if scaling is not None and scaling.kind == "yarn" else 1.0


def rotary_table(position_ids: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, times `scale`.

    Args:
        position_ids: int64 [B, L] or [1, L].
        frequencies: float32 [D/2].
        scale: see `attention_sharpness`.

    Returns:
        float32: cosines [B, L, 1, D], those of pair i at i and at i + D/2, and sines [B, L, 1, D/2]. The singleton
        axis stands for the heads.
    """
    angles = (position_ids[..., None].float() * frequencies)[:, :, None, :]
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), dim=-1), sin


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [B, L, H, D] by the angles of `table`; computed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide) for t in table)
    return _Rotation.apply(x.to(wide), cos, sin).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """Rotation in three passes over memory each way, where autograd of the formula needs seven."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = x * cos
        first, second = x.chunk(2, dim=-1)
        rotated_first, rotated_second = rotated.chunk(2, dim=-1)
        rotated_first.addcmul_(second, sin, value=-1)
        rotated_second.addcmul_(first, sin)
        return rotated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(gradient, cos, -sin), None, None
