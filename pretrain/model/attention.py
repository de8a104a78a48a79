"""Attention of three kinds (dual-triangle, bidirectional, causal) over two kernels (sdpa, dense).

Shapes: B rows, L positions, n logical heads of width d. Dual-triangle attention (arXiv 2604.18603) gives each logical
head two sub-heads of width d/2: `lower` attends to past and self (j <= i), `upper` to self and future (j >= i), each
with its own softmax and scale 1/sqrt(d/2); their outputs are concatenated back to width d.

Reversing a document turns its upper triangle into a lower one. So the sdpa kernel reverses q, k and v of the upper
sub-heads inside each document, runs ordinary causal attention, and reverses the result back: half the work of full
attention, and no mask.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.layout import AttentionLayout

Kind = Literal["dual_triangle", "bidirectional", "causal"]
Kernel = Literal["auto", "sdpa", "dense"]


def attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, kernel: Kernel = "auto") -> Tensor:
    """Attend within documents.

    Args:
        q: queries [B, L, n, d], any floating dtype; for dual-triangle the first d/2 dimensions of a head are its
            lower sub-head and the last d/2 its upper one.
        k: keys, like q.
        v: values, like q.
        layout: where the documents lie.
        kind: which positions a position attends to.
        kernel: `auto` is sdpa.

    Returns:
        [B, L, n, d] in the dtype of q; zeros in padding.

    Raises:
        ValueError: shapes that do not fit the layout, an odd head width, or packed rows with the sdpa kernel.
    """
    if q.shape != k.shape or q.shape != v.shape or q.shape[:2] != layout.document_ids.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be equal and begin with the layout's "
            f"{tuple(layout.document_ids.shape)}"
        )
    if kind == "dual_triangle" and q.shape[-1] % 2:
        raise ValueError(f"a head of width {q.shape[-1]} cannot be split into two sub-heads")
    out = (_dense if kernel == "dense" else _sdpa)(q, k, v, layout, kind)
    return out.masked_fill((layout.document_ids == 0)[:, :, None, None], 0) if layout.padded else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind) -> Tensor:
    if not layout.one_document_per_row:
        raise ValueError("the sdpa kernel needs rows of one document each; use kernel dense for packed rows")
    if kind == "dual_triangle":
        lower, upper = zip(*(x.chunk(2, dim=-1) for x in (q, k, v)), strict=True)
        reversed_upper = (reverse(x, layout) for x in upper)
        return torch.cat((_causal(*lower), reverse(_causal(*reversed_upper), layout)), dim=-1)
    if kind == "causal":
        return _causal(q, k, v)
    mask = (layout.document_ids != 0)[:, None, None, :] if layout.padded else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, L, H, D]. Padding comes last, so no real position sees it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def reverse(x: Tensor, layout: AttentionLayout) -> Tensor:
    """Mirror `x` [B, L, H, D] inside each document; its own inverse."""
    if layout.one_document_per_row and not layout.padded:
        return x.flip(1)
    return torch.gather(x, 1, layout.reversal[:, :, None, None].expand_as(x))


def allowed_pairs(layout: AttentionLayout, kind: Kind) -> Tensor:
    """bool [M, B, 1, L, L]: may query i (fourth axis) attend to key j (last axis)? M = 2 (lower, upper) or 1."""
    documents = layout.document_ids
    same = (documents[:, :, None] == documents[:, None, :]) & (documents != 0)[:, :, None]
    past_and_self = torch.ones_like(same[0]).tril()
    triangles = {
        "dual_triangle": [past_and_self, past_and_self.T],
        "causal": [past_and_self],
        "bidirectional": [torch.ones_like(past_and_self)],
    }[kind]
    return torch.stack([same & triangle for triangle in triangles])[:, :, None]


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind) -> Tensor:
    """The reference: every score, masked, in one softmax; any dtype up to float64."""
    outputs = []
    pairs = allowed_pairs(layout, kind)
    parts = [x.transpose(1, 2).chunk(len(pairs), dim=-1) for x in (q, k, v)]
    for part_q, part_k, part_v, allowed in zip(*parts, pairs, strict=True):
        scores = part_q @ part_k.mT * part_q.shape[-1] ** -0.5
        # Padding attends to nothing; a softmax over nothing is made zero rather than NaN.
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        outputs.append(weights @ part_v)
    return torch.cat(outputs, dim=-1).transpose(1, 2)
