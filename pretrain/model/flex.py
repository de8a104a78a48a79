"""The flex kernel: flex_attention with one block mask, causal within documents, shared by all heads and layers.

Both triangles are one call, the upper sub-heads reversed. The block mask is worked out from where documents begin, in
blocks; no [L, L] tensor is made for it.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pretrain.model.kernels import TRIANGLES, Kind, reverse, split_heads
from pretrain.model.layout import AttentionLayout

_FLEX_BLOCK = 128


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, window: int | None) -> Tensor:
    """Attend by flex_attention: compiled on CUDA; on CPU uncompiled and forward only.

    Raises:
        ValueError: on CPU, if an input requires grad: flex_attention has no backward pass there.
    """
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "flex_attention has no backward pass on CPU; use kernel sdpa, or torch.no_grad() for a forward pass alone"
        )
    causal = kind != "bidirectional"
    mask = layout.once(("flex", causal, window), lambda: block_mask(layout, causal, window))
    call = _compiled() if q.is_cuda else flex_attention
    heads = []
    for x in (q, k, v):
        sides = zip(split_heads(x, kind), TRIANGLES[kind], strict=True)
        heads.append(torch.cat([reverse(h, layout) if side == "future" else h for h, side in sides], dim=2))
    out = call(*(x.transpose(1, 2) for x in heads), block_mask=mask).transpose(1, 2)
    sides = zip(out.split(q.shape[2], dim=2), TRIANGLES[kind], strict=True)
    return torch.cat([reverse(h, layout) if side == "future" else h for h, side in sides], dim=-1)


def block_mask(layout: AttentionLayout, causal: bool, window: int | None) -> BlockMask:
    """Let position i attend to j of its document, up to itself if `causal`, nearer than `window` if there is one.

    Padding counts as a document, so that no position attends to nothing.
    """
    length = layout.document_ids.shape[1]
    columns = torch.arange(length, device=layout.device)
    begins = torch.ones_like(layout.document_ids, dtype=torch.bool)
    begins[:, 1:] = layout.document_ids[:, 1:] != layout.document_ids[:, :-1]
    first = torch.where(begins, columns, 0).cummax(dim=1).values
    ends = torch.cat((begins[:, 1:], begins[:, :1]), dim=1)
    last = torch.where(ends, columns, length).flip(1).cummin(dim=1).values.flip(1)
    reach = length if window is None else window

    def may_attend(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001
        near = (i - j < reach) & (j - i < (1 if causal else reach))
        return near & (j >= first[b, i]) & (j <= last[b, i])

    # A block of queries [low, high] sees keys from `low`'s earliest to `high`'s latest; a block of keys is full, and
    # needs no mask, if the latest query still sees its first key and the earliest query its last.
    num_blocks = -(-length // _FLEX_BLOCK)
    low = torch.arange(num_blocks, device=layout.device) * _FLEX_BLOCK
    high = (low + _FLEX_BLOCK - 1).clamp(max=length - 1)
    back, ahead = reach - 1, 0 if causal else reach - 1
    earliest = torch.maximum(first[:, low], low - back)[:, :, None]
    latest = torch.minimum(last[:, high], high + ahead)[:, :, None]
    some = (high >= earliest) & (low <= latest)
    from_high = torch.maximum(first[:, high], high - back)[:, :, None]
    to_low = torch.minimum(last[:, low], low + ahead)[:, :, None]
    # A cut block at the end is never full: the kernel would read beyond the row.
    whole = (low + _FLEX_BLOCK <= length) & (low + _FLEX_BLOCK <= length)[:, None]
    full = some & (low >= from_high) & (high <= to_low) & whole

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        return blocks.sum(dim=-1, dtype=torch.int32)[:, None], order[:, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~full),
        *listed(full),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=may_attend,
        seq_lengths=(length, length),
    )
