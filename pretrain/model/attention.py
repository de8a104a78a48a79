"""`attention`: dual-triangle, bidirectional or causal, within documents and windows, by the kernel that fits.

Shapes: B rows, L positions, n logical heads of width d. Dual-triangle attention (arXiv 2604.18603) gives each logical
head two sub-heads of width d/2: `lower` attends to past and self (j <= i), `upper` to self and future (j >= i), each
with its own softmax and scale 1/sqrt(d/2); their outputs are concatenated back to width d.

Reversing a document turns its upper triangle into a lower one. So the kernels reverse q, k and v of the upper
sub-heads inside each document, run ordinary causal attention, and reverse the result back: half the work of full
attention, and no mask.
"""

import logging
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from pretrain.model import kernels
from pretrain.model.flex import flex
from pretrain.model.kernels import TRIANGLES, Kind
from pretrain.model.layout import AttentionLayout

log = logging.getLogger(__name__)
Kernel = Literal["auto", "sdpa", "varlen", "flex", "dense"]
_KERNELS = {"sdpa": kernels.sdpa, "varlen": kernels.varlen, "flex": flex, "dense": kernels.dense}
_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@torch.compiler.disable(recursive=True)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    kind: Kind,
    kernel: Kernel = "auto",
    window: int | None = None,
) -> Tensor:
    """Attend within documents.

    Args:
        q: queries [B, L, n, d], any floating dtype; for dual-triangle the first d/2 dimensions of a head are its
            lower sub-head and the last d/2 its upper one.
        k: keys, like q.
        v: values, like q.
        layout: where the documents lie. Where it says that rows are spread over S ranks, q, k, v and the result are
            [B, L/S, n, d], and this is collective among these ranks.
        kind: which positions a position attends to.
        kernel: `sdpa` (any device), `varlen` (CUDA, bf16 or fp16), `flex` (no backward pass on CPU), `dense` (the
            slow reference); `auto` is the fastest that fits, see `choose_kernel`.
        window: W positions, itself included. Lower sub-heads and causal heads see i-W < j <= i, upper sub-heads
            i <= j < i+W, bidirectional heads |i-j| < W. None: the whole document.

    Returns:
        [B, L, n, d] in the dtype of q; zeros in padding.

    Raises:
        ValueError: shapes that do not fit the layout, an odd head width, a window below 1, an unknown kind or kernel,
            or a kernel that cannot run here (varlen without CUDA, flex with gradients on CPU).
    """
    if (ranks := layout.shared_by) is not None:
        if q.shape[2] % ranks.size:
            raise ValueError(f"{q.shape[2]} heads cannot be shared out among {ranks.size} ranks")
        q, k, v = (ranks.to_heads(x) for x in (q, k, v))
        return ranks.to_positions(_whole_rows(q, k, v, layout, kind, kernel, window))
    return _whole_rows(q, k, v, layout, kind, kernel, window)


def _whole_rows(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, kernel: Kernel, window: int | None
) -> Tensor:
    """Attend for q, k and v over whole rows, whoever they are shared with."""
    _check(q, k, v, layout, kind, window)
    if window is not None and window >= q.shape[1]:
        window = None
    if kernel == "auto":
        width = q.shape[-1] // len(TRIANGLES[kind])
        kernel = choose_kernel(q.device, q.dtype, width, layout, window)
    if kernel not in _KERNELS:
        raise ValueError(f"there is no attention kernel {kernel!r}; there are auto, {', '.join(_KERNELS)}")
    if kernel == "varlen" and not (q.is_cuda and q.dtype in _FLASH_DTYPES):
        raise ValueError(f"kernel varlen runs on CUDA in bf16 or fp16, not on {q.device.type} in {q.dtype}; use sdpa")
    out = _KERNELS[kernel](q, k, v, layout, kind, window)
    return out.masked_fill((layout.document_ids == 0)[:, :, None, None], 0) if layout.padded else out


def _check(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kind: Kind, window: int | None) -> None:
    if kind not in TRIANGLES:
        raise ValueError(f"there is no attention kind {kind!r}; there are {', '.join(TRIANGLES)}")
    if q.shape != k.shape or q.shape != v.shape or q.shape[:2] != layout.document_ids.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be equal and begin with the layout's "
            f"{tuple(layout.document_ids.shape)}"
        )
    if q.device != layout.device:
        raise ValueError(f"q is on {q.device}, the layout on {layout.device}; move it with layout.to(device)")
    if kind == "dual_triangle" and q.shape[-1] % 2:
        raise ValueError(f"a head of width {q.shape[-1]} cannot be split into two sub-heads")
    if window is not None and window < 1:
        raise ValueError(
            f"a window of {window} positions holds nothing; a position always sees itself, so use 1 or more"
        )


def choose_kernel(
    device: torch.device, dtype: torch.dtype, width: int, layout: AttentionLayout, window: int | None
) -> Kernel:
    """Return what `auto` means for (sub-)heads of `width`; the log tells it once.

    It never chooses `flex` or `dense`: `sdpa` does everything without a score matrix, forward and backward.
    """
    choice: Kernel = "sdpa"
    if device.type != "cuda":
        reason = f"the kernel for {device.type}"
    elif layout.one_document_per_row and window is None:
        reason = "one document a row: causal flash attention needs no more"
    elif dtype not in _FLASH_DTYPES:
        reason = f"{dtype} has no varlen flash attention"
    elif width % 8 or width > 256:
        reason = f"varlen flash attention takes widths that 8 divides, up to 256, not {width}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "varlen flash attention needs compute capability 8.0"
    else:
        choice, reason = "varlen", "packed rows or windows: flash attention over documents laid end to end"
    _announce(choice, reason)
    return choice


@lru_cache(maxsize=32)
def _announce(kernel: str, reason: str) -> None:
    log.info("attention kernel auto is %s: %s", kernel, reason)
