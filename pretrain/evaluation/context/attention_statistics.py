"""How each triangle of each layer attends: entropy, largest logit, mass on the window's edges, mass by distance.

Only some queries of a row are looked at, so that no score matrix is made: with S sampled queries of L positions, memory
is O(S L) at any length. The encoder is run as it is; hooks on its blocks see what goes into them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pretrain.evaluation.report.schema import EDGE_TOKENS
from pretrain.model.encoder import Encoder
from pretrain.model.kernels import TRIANGLES, Kind, split_heads

QUERIES = 64
"""Sampled in each row, evenly."""

_BESIDE = 16
"""A query nearer to an edge than this says nothing about a sink there."""

FIELDS = ("entropy", "uniform_entropy", "largest_logit", "first_tokens", "last_tokens")

LARGEST_LOGIT = FIELDS.index("largest_logit")


def distance_bounds(length: int) -> list[int]:
    """Lower bounds of the distances told apart: 0, 1, 2, 4, ..."""
    return [0, *(2**k for k in range(max(1, (length - 1).bit_length())))]


def triangle_statistics(q: Tensor, k: Tensor, kind: Kind, window: int | None) -> Tensor:
    """What sampled queries of a layer do.

    Args:
        q: queries [B, L, n, d] as attention is given them, one document a row.
        k: keys, like q.
        kind: of attention.
        window: its span.

    Returns:
        float32 [triangles, FIELDS + distances]: means over rows, heads and sampled queries, the largest logit over
        all of these.
    """
    length = q.shape[1]
    queries = torch.linspace(0, length - 1, min(QUERIES, length), device=q.device).round().long()
    ahead = torch.arange(length, device=q.device) - queries[:, None]
    near = ahead.abs() < (window or length)
    allowed = {"past": near & (ahead <= 0), "future": near & (ahead >= 0), "both": near}
    parts = zip(split_heads(q, kind), split_heads(k, kind), TRIANGLES[kind], strict=True)
    return torch.stack([_one(a[:, queries], b, allowed[side], ahead, queries) for a, b, side in parts])


def _one(q: Tensor, k: Tensor, allowed: Tensor, ahead: Tensor, queries: Tensor) -> Tensor:
    """Return the statistics of one triangle: q [B, S, n, d], k [B, L, n, d], allowed and ahead [S, L]."""
    scores = torch.einsum("bsnd,blnd->bnsl", q.float(), k.float()) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(dim=-1)
    entropy = -torch.special.xlogy(weights, weights).sum(dim=-1).mean()
    uniform = allowed.sum(dim=-1).double().log().mean()
    length = k.shape[1]
    mean = weights.mean(dim=(0, 1))
    first = _mass(mean[:, :EDGE_TOKENS].sum(dim=-1), queries >= EDGE_TOKENS + _BESIDE)
    last = _mass(mean[:, -EDGE_TOKENS:].sum(dim=-1), queries < length - EDGE_TOKENS - _BESIDE)
    bounds = torch.tensor(distance_bounds(length), device=k.device)
    bins = torch.bucketize(ahead.abs(), bounds, right=True) - 1
    by_distance = torch.zeros(len(bounds), device=k.device).index_add_(0, bins.flatten(), mean.flatten()) / len(queries)
    fields = torch.stack([entropy, uniform.float(), scores.max(), first, last])
    return torch.cat([fields, by_distance])


def _mass(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over the queries that count; 0 if none does."""
    return values[counts].mean() if bool(counts.any()) else values.new_zeros(())


@contextmanager
def watch_attention(encoder: Encoder, seen: list[list[Tensor]]) -> Iterator[None]:
    """Append a list to `seen` in every forward pass inside: for each layer what `triangle_statistics` returns."""

    def look(block: Any, arguments: tuple[Any, ...]) -> None:
        x, _, rotary, _, skips = arguments
        _, q, k, _ = block.before_attention(x, rotary, skips)
        if block is encoder.blocks[0]:
            seen.append([])
        seen[-1].append(triangle_statistics(q, k, encoder.config.attention, block.attention.window).cpu())

    hooks = [block.register_forward_pre_hook(look) for block in encoder.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
