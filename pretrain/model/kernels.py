"""The kernels behind `attention`: how scores are computed, for q, k, v [B, L, H, D] whose checks are done already.

`sdpa` runs anywhere on scaled_dot_product_attention: causal calls where a row is one document, documents unpacked
into rectangles where rows are packed, blocks of queries over neighbouring blocks of keys where a window limits the
span, and masks for short rows on the CPU. `varlen` is flash attention over the documents of packed rows, `dense` the
reference. flex.py has the fourth.

A triangle is `past` (j <= i) or `future` (j >= i); `both` is no triangle. Outputs in padding are anything finite.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.layout import AttentionLayout

Kind = Literal["dual_triangle", "bidirectional", "causal"]
Triangle = Literal["past", "future", "both"]
TRIANGLES: dict[Kind, tuple[Triangle, ...]] = {
    "dual_triangle": ("past", "future"),
    "bidirectional": ("both",),
    "causal": ("past",),
}
_SHORT_ROW = 256
"""Positions up to which rows are masked rather than re-indexed on the CPU: below two blocks of keys, causal flash
attention computes all scores anyway."""
_SMALLEST_BLOCK = 64
"""Queries in a block where the window is smaller: smaller blocks spend their time in calls."""


def split_heads(x: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    """Split off the sub-heads of each triangle: [B, L, H, D] -> one or two [B, L, H, D / number]."""
    return x.chunk(len(TRIANGLES[kind]), dim=-1)


def reverse(x: Tensor, layout: AttentionLayout) -> Tensor:
    """Mirror `x` [B, L, H, D] inside each document; its own inverse."""
    if layout.one_document_per_row and not layout.padded:
        return x.flip(1)
    return layout.mirrored.apply(x.flatten(0, 1)).unflatten(0, x.shape[:2])


# ------------------------------------------------------------------------------------------------------- sdpa


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, window: int | None) -> Tensor:
    """Attend by scaled_dot_product_attention, on any device.

    On the CPU in float32 or wider: torch's flash attention there takes two to four times as long in half precision.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float(), layout, kind, window).to(q.dtype)
    if q.device.type == "cpu" and q.shape[1] <= _SHORT_ROW:
        return _short_rows(q, k, v, layout, kind, window)
    if window is not None:
        attend: Callable[..., Tensor] = partial(_windowed, window=window)
    else:
        attend = _one_document if layout.one_document_per_row else _documents
    parts = zip(*(split_heads(x, kind) for x in (q, k, v)), TRIANGLES[kind], strict=True)
    outputs = [attend(*part[:3], layout, part[3]) for part in parts]
    return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


def _short_rows(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, window: int | None) -> Tensor:
    """Attend by a mask instead of moving anything; for the CPU."""
    alike, dual = layout.one_document_per_row and not layout.padded, kind == "dual_triangle"
    if alike and not dual and window is None:
        return _call(q, k, v, causal=kind == "causal")
    key = ("short", kind, window, q.dtype)
    masks = layout.once(key, lambda: _short_masks(layout, kind, window, q.dtype))
    if alike and dual:
        n = q.shape[2]
        mask = layout.once((*key, n), lambda: masks[:, 0, 0].repeat(n, 1, 1)[None])
        q, k, v = (x.unflatten(-1, (2, -1)).flatten(2, 3) for x in (q, k, v))
        return _call(q, k, v, mask=mask).unflatten(2, (n, 2)).flatten(-2)
    parts = zip(*(split_heads(x, kind) for x in (q, k, v)), masks, strict=True)
    return torch.cat([_call(part[0], part[1], part[2], mask=part[3]) for part in parts], dim=-1)


def _short_masks(layout: AttentionLayout, kind: Kind, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, 0 or -inf, [triangles, B, 1, L, L]; B is 1 where rows are one full document.

    Padding attends to itself, so that no softmax is over nothing.
    """
    documents = layout.document_ids
    if layout.one_document_per_row and not layout.padded:
        documents = documents[:1]
    itself = torch.eye(documents.shape[1], dtype=torch.bool, device=documents.device)
    zero = torch.zeros((), dtype=dtype, device=documents.device)
    return torch.where(_pairs(documents, kind, window) | itself, zero, -torch.inf)


def _one_document(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, side: Triangle) -> Tensor:
    """Attend in rows of one document; padding comes last, so under a causal mask no real position sees it."""
    if side == "future":
        q, k, v = (reverse(x, layout) for x in (q, k, v))
        return reverse(_call(q, k, v, causal=True), layout)
    if side == "past":
        return _call(q, k, v, causal=True)
    mask = None
    if layout.padded:
        filled = layout.document_ids != 0
        # A row of padding alone attends to its padding: a softmax over nothing would be NaN.
        mask = (filled | ~filled.any(dim=1, keepdim=True))[:, None, None, :]
    return _call(q, k, v, mask=mask)


def _documents(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, side: Triangle) -> Tensor:
    """Attend in packed rows, documents one by one."""
    unpacked, shape = layout.unpacked, q.shape[:2]
    if unpacked.in_place:
        rectangle = (unpacked.buckets[0].documents, unpacked.buckets[0].longest)
        q, k, v = (x.flatten(0, 1).unflatten(0, rectangle) for x in (q, k, v))
        if side == "future":
            out = _call(q.flip(1), k.flip(1), v.flip(1), causal=True).flip(1)
        else:
            out = _call(q, k, v, causal=side == "past")
        return out.flatten(0, 1).unflatten(0, shape)
    order = unpacked.backward if side == "future" else unpacked.forward
    sizes = [bucket.documents * bucket.longest for bucket in unpacked.buckets]
    pieces = zip(*(order.apply(x.flatten(0, 1)).split(sizes) for x in (q, k, v)), strict=True)
    outputs = []
    for bucket, piece in zip(unpacked.buckets, pieces, strict=True):
        part = tuple(x.unflatten(0, (bucket.documents, bucket.longest)) for x in piece)
        mask = None if side != "both" or bucket.filled is None else bucket.filled[:, None, None, :]
        outputs.append(_call(part[0], part[1], part[2], causal=side != "both", mask=mask).flatten(0, 1))
    return order.inverted.apply(torch.cat(outputs)).unflatten(0, shape)


def _call(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Call scaled_dot_product_attention for [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, side: Triangle, window: int) -> Tensor:
    """Attend in blocks of W queries to their own and the neighbouring blocks of keys: O(L W) in time and memory.

    The rows are taken as one sequence [B x L]; what lies in another row or document is masked.
    """
    rows, length = q.shape[:2]
    block = min(max(window, _SMALLEST_BLOCK), rows * length)
    before, after = side != "future", side != "past"
    num_blocks = -(-rows * length // block)
    filler = num_blocks * block - rows * length
    queries = F.pad(q.flatten(0, 1), (0, 0, 0, 0, 0, filler)).unflatten(0, (num_blocks, block))
    span = (1 + before + after) * block
    keys, values = (
        F.pad(x.flatten(0, 1), (0, 0, 0, 0, before * block, filler + after * block)).unfold(0, span, block)
        for x in (k, v)
    )
    mask = layout.once(("window", side, window, q.dtype), lambda: _window_mask(layout, side, window, block, q.dtype))
    out = F.scaled_dot_product_attention(queries.transpose(1, 2), keys.mT, values.mT, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)[: rows * length].unflatten(0, (rows, length))


def _window_mask(layout: AttentionLayout, side: Triangle, window: int, block: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, 0 or -inf, [blocks, 1, block, keys]; padding attends to itself.

    It is not bool: scaled_dot_product_attention would turn it into this in every layer anew.
    """
    before, after = side != "future", side != "past"
    first = layout.first_positions
    num_blocks = -(-len(first) // block)
    own = torch.arange(-before * block, (num_blocks + after) * block, device=first.device)
    # Outside the rows every position is a document of its own.
    documents = own.clone()
    documents[before * block : before * block + len(first)] = first
    keys, key_documents = (x.unfold(0, (1 + before + after) * block, block)[:, None] for x in (own, documents))
    inner = slice(before * block, (before + num_blocks) * block)
    queries, query_documents = (x[inner].unflatten(0, (num_blocks, block))[:, :, None] for x in (own, documents))
    ahead = keys - queries
    allowed = (key_documents == query_documents) & (ahead.abs() < window)
    if side != "both":
        allowed &= (ahead <= 0) if side == "past" else (ahead >= 0)
    zero = torch.zeros((), dtype=dtype, device=first.device)
    return torch.where(allowed, zero, -torch.inf)[:, None]


# ----------------------------------------------------------------------------------------------------- varlen


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, window: int | None) -> Tensor:
    """Attend by flash attention over documents laid end to end, without padding between them. CUDA, bf16 or fp16."""
    from torch.nn.attention.varlen import varlen_attn

    if not layout.document_lengths:
        return (q + k + v) * 0
    reach = -1 if window is None else window - 1
    in_order, in_reverse = layout.tokens
    lengths, longest = layout.cu_seqlens, layout.longest_document
    outputs = []
    for part, side in zip(zip(*(split_heads(x, kind) for x in (q, k, v)), strict=True), TRIANGLES[kind], strict=True):
        order = in_reverse if side == "future" else in_order
        moved = side == "future" or layout.padded
        queries, keys, values = (order.apply(x.flatten(0, 1)) if moved else x.flatten(0, 1) for x in part)
        size = (reach, reach if side == "both" else 0)
        out = varlen_attn(queries, keys, values, lengths, lengths, longest, longest, window_size=size)
        assert isinstance(out, Tensor)
        outputs.append(order.inverted.apply(out) if moved else out)
    return torch.cat(outputs, dim=-1).unflatten(0, q.shape[:2])


# ------------------------------------------------------------------------------------------------------ dense


def allowed_pairs(layout: AttentionLayout, kind: Kind, window: int | None = None) -> Tensor:
    """Say whether query i (fourth axis) may attend to key j (last axis).

    Returns:
        bool [M, B, 1, L, L]; M = 2 (lower, upper) or 1.
    """
    return _pairs(layout.document_ids, kind, window)


def _pairs(documents: Tensor, kind: Kind, window: int | None) -> Tensor:
    same = (documents[:, :, None] == documents[:, None, :]) & (documents != 0)[:, :, None]
    columns = torch.arange(documents.shape[1], device=documents.device)
    ahead = columns - columns[:, None]
    near = ahead.abs() < (len(columns) if window is None else window)
    sides = {"past": ahead <= 0, "future": ahead >= 0, "both": torch.ones_like(near)}
    return torch.stack([same & near & sides[side] for side in TRIANGLES[kind]])[:, :, None]


def dense(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, window: int | None) -> Tensor:
    """Attend by the reference: every score, masked, in one softmax; any dtype up to float64."""
    outputs = []
    pairs = layout.once(("pairs", kind, window), lambda: allowed_pairs(layout, kind, window))
    parts = [x.transpose(1, 2).chunk(len(pairs), dim=-1) for x in (q, k, v)]
    for part_q, part_k, part_v, allowed in zip(*parts, pairs, strict=True):
        scores = part_q @ part_k.mT * part_q.shape[-1] ** -0.5
        # Padding attends to nothing; a softmax over nothing is made zero rather than NaN.
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        outputs.append(weights @ part_v)
    return torch.cat(outputs, dim=-1).transpose(1, 2)
