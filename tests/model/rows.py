"""Rows and inputs for the tests of attention."""

import torch

from pretrain.batch import Batch
from pretrain.model.attention import attention
from pretrain.model.layout import AttentionLayout

KINDS = ("dual_triangle", "bidirectional", "causal")


def layout_of(*rows: list[int], length: int) -> AttentionLayout:
    """Rows given by the lengths of their documents, padded to `length`."""
    documents, positions = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for row, lengths in enumerate(rows):
        start = 0
        for number, n in enumerate(lengths, start=1):
            documents[row, start : start + n] = number
            positions[row, start : start + n] = torch.arange(n)
            start += n
    return AttentionLayout.from_batch(Batch(documents, documents, documents, positions))


def random_qkv(layout: AttentionLayout, heads: int = 2, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (*layout.document_ids.shape, heads, width)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]


def values_and_gradients(inputs, layout, kind, kernel, window=None) -> list[torch.Tensor]:
    gradient = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = attention(*inputs, layout, kind, kernel, window)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]
