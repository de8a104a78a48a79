"""Rotary position embedding (Su et al., arXiv 2104.09864), as pure functions of positions."""

import torch
from torch import Tensor


def rotary_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/dim) for i = 0 .. dim/2 - 1, float32 [dim/2], in radians per position."""
    if dim % 2:
        raise ValueError(f"rotary embedding rotates pairs of dimensions, but the (sub-)head is {dim} wide")
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotary_table(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines.

    Args:
        position_ids: int64 [B, L] or [1, L].
        frequencies: float32 [D/2].

    Returns:
        Two float32 tensors [B, L, 1, D/2]: the singleton axis stands for the heads.
    """
    angles = (position_ids[..., None].float() * frequencies)[:, :, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [B, L, H, D] by the angles of `table`; computed in float32 or wider."""
    cos, sin = table
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
