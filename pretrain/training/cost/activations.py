"""Bytes that the forward pass keeps for the backward pass, from the architecture: pure arithmetic, nothing is run.

Each term is a tensor that autograd saves in `pretrain/model/`: change an operation there and this page changes with
it (a test compares both, by hooks on what is really saved). h, a, f are the widths of the residual stream, of all
heads together and inside the feed-forward layer; c is the bytes of an element in the matrix products, r in the
residual stream. Rows of up to 256 positions, which the CPU masks instead of moving, are planned as longer ones are:
a few percent too much.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.config.model import LayerConfig, ModelConfig
from pretrain.model.kernels import TRIANGLES

STATISTIC = 4
"""Bytes of a number that is fp32 whatever the precision: the norm of a row, its softmax, its loss."""
SMALLEST_BLOCK = 64
"""Queries that the windowed kernel takes at once, at least."""
PACKING_OVERHEAD = 4 / 3
"""Most places for each position where kernel `sdpa` puts packed documents into rectangles (see `AttentionLayout`)."""


@dataclass(frozen=True)
class ForwardPass:
    """What goes through the model at once on one rank, and how it is computed."""

    model: ModelConfig
    vocab_size: int
    rows: int
    length: int
    masked: int
    """Positions to predict, of those that the rank holds."""
    compute_bytes: int = 4
    """c: bytes of an element in matrix products."""
    residual_bytes: int = 4
    """r: bytes of an element of the residual stream; 4 beside c = 2 under autocast."""
    checkpoint_every: int = 0
    """Every k-th block is computed again in the backward pass; 0 for none."""
    compiled: bool = False
    on_gpu: bool = False
    packed: bool = False
    """Rows hold several documents."""
    packing_overhead: float = 1.0
    """Places of the rectangles, or tokens, for each position of packed rows."""
    sequence: int = 1
    """S: ranks that share the rows."""

    @property
    def positions(self) -> int:
        """Positions that the rank holds. In attention, all positions of n/S heads, which is as much."""
        return math.ceil(self.whole_positions / self.sequence)

    @property
    def whole_positions(self) -> int:
        """Rows times length."""
        return self.rows * self.length

    @property
    def kernel(self) -> Literal["sdpa", "varlen", "flex", "dense"]:
        """The config's; `auto` as `choose_kernel` decides for packed rows (layers with windows see `kernel_of`)."""
        if self.model.kernel != "auto":
            return self.model.kernel
        return "varlen" if self.on_gpu and self.packed and self._flash else "sdpa"

    def kernel_of(self, layer: LayerConfig) -> Literal["sdpa", "varlen", "flex", "dense"]:
        """What computes a layer's scores."""
        window = self.window_of(layer)
        auto = self.model.kernel == "auto" and self.on_gpu and self._flash
        return "varlen" if auto and window is not None else self.kernel

    def window_of(self, layer: LayerConfig) -> int | None:
        """A window as wide as the rows is none."""
        return layer.window if layer.window is not None and layer.window < self.length else None

    @property
    def _flash(self) -> bool:
        width = self.model.sub_head_size
        return self.compute_bytes == 2 and width % 8 == 0 and width <= 256


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank while a micro-batch goes through the model."""

    blocks: int
    """Kept from all blocks, the embedding and the last norm, from the forward to the backward pass."""
    recomputed: int
    """Kept from one block that is computed again, while its own backward pass runs."""
    gradients: int
    """Gradients of activations inside one block, at most at once."""
    logits: int
    """Kept at the masked positions: their log-softmax and the hidden states it comes from."""
    logits_working: int
    """Logits in fp32 and in the precision of the head, beside them while the loss and its gradient are computed."""

    @property
    def saved(self) -> int:
        """What autograd has saved when the forward pass ends."""
        return self.blocks + self.logits

    @property
    def peak(self) -> int:
        """The most that is alive at once: around the loss, or in the backward pass of the last block."""
        return self.blocks + max(self.logits + self.logits_working, self.recomputed + self.gradients)


def activations(forward: ForwardPass) -> Activations:
    """Return the bytes of one micro-batch on one rank."""
    model, n = forward.model, forward.positions
    layers = model.resolved_layers
    whole = [block_bytes(forward, layer) for layer in layers]
    again = [bool(forward.checkpoint_every) and i % forward.checkpoint_every == 0 for i in range(len(layers))]
    inputs = forward.residual_bytes * model.hidden_size * n
    kept: float = sum(inputs if recomputed else own for own, recomputed in zip(whole, again, strict=True))
    kept += _norm(forward, model.hidden_size) * forward.masked
    if model.dropout:
        kept += _dropout(forward, forward.residual_bytes, compiled=False) * model.hidden_size * n
    if forward.compute_bytes < forward.residual_bytes:
        kept += forward.compute_bytes * _matrices(model, forward.vocab_size)
    kept += _shared(forward)
    logits = forward.masked * forward.vocab_size
    return Activations(
        blocks=math.ceil(kept),
        recomputed=max((own for own, recomputed in zip(whole, again, strict=True) if recomputed), default=0),
        gradients=4 * forward.compute_bytes * max(model.ffn_size, model.attention_size) * n + _exchanged(forward),
        logits=logits * STATISTIC * (2 if model.z_loss else 1)
        + forward.masked * (forward.compute_bytes * model.hidden_size + 8 + STATISTIC),
        logits_working=logits * (STATISTIC + (forward.compute_bytes if forward.compute_bytes < STATISTIC else 0)),
    )


def _exchanged(forward: ForwardPass) -> int:
    """What is sent and received for q, k and v in the backward pass, besides their gradients; for shared rows only."""
    if forward.sequence == 1:
        return 0
    return 2 * 3 * forward.compute_bytes * forward.model.attention_size * forward.positions


def block_bytes(forward: ForwardPass, layer: LayerConfig) -> int:
    """Bytes that one block keeps."""
    model, c, r = forward.model, forward.compute_bytes, forward.residual_bytes
    h, f = model.hidden_size, model.ffn_size
    per_position = 2 * _norm(forward, h) + 2 * c * h
    # gate and up, their product, and the activation of the gate, which a compiled block computes again
    per_position += c * f * (3 if forward.compiled else 4)
    if model.dropout:
        per_position += 2 * h * _dropout(forward, c, forward.compiled)
    if model.unet:
        per_position += r * h
    return math.ceil(per_position * forward.positions + _attention(forward, layer))


def _norm(forward: ForwardPass, width: float) -> float:
    """RMSNorm of `width` elements. On the CPU it is no single operation: two copies in fp32 stay."""
    fused = forward.compiled or forward.on_gpu
    return (forward.residual_bytes if fused else 2 * STATISTIC) * width + STATISTIC


def _dropout(forward: ForwardPass, element_bytes: int, compiled: bool) -> int:
    """Bytes of an element of what dropout keeps: a bit mask as bool on the GPU, on the CPU its scaled values."""
    return 1 if forward.on_gpu or compiled else element_bytes


def _attention(forward: ForwardPass, layer: LayerConfig) -> float:
    """What attention keeps, from the projection of q, k and v to the input of the projection of its output."""
    model, c, n = forward.model, forward.compute_bytes, forward.positions
    kernel, window = forward.kernel_of(layer), forward.window_of(layer)
    whole, shared = forward.whole_positions, forward.sequence > 1
    triangles, a = len(TRIANGLES[model.attention]), model.attention_size
    # q, k and v are views of one projection; rotary positions and norms make new q and k.
    # Of shared rows attention reads what was received, and the projection of its output reads what came back.
    made = layer.positions == "rotary" or model.qk_norm
    views = (5 if made and not shared else 3) * a
    back = c * a if shared and triangles == 1 else 0
    reads_views = False
    # On the CPU sdpa computes in fp32, from copies of a half-precision q, k and v; its output is made half again.
    widened = kernel == "sdpa" and not forward.on_gpu and c < STATISTIC
    inside = STATISTIC if widened else c
    statistics: float = STATISTIC * model.num_heads * triangles
    if kernel == "dense":
        # copies of q, k and v, the weights of each triangle before and after NaN is cleared, outputs side by side
        kept = c * (4.0 * a + 2 * model.num_heads * triangles * forward.length)
        statistics = 0
    elif window is not None and kernel == "sdpa":
        block = min(max(window, SMALLEST_BLOCK), whole)
        margin = (1 if triangles == 2 or model.attention == "causal" else 2) * block / whole
        filled = math.ceil(whole / block) * block / whole
        # padded copies of q, k and v, and the output; with two triangles also both outputs side by side
        kept = inside * a * (2 * filled + 2 * (filled + margin)) + (c * a if triangles == 2 or widened else back)
    elif kernel == "sdpa" and forward.packed:
        # gathered q, k, v and the outputs, and what is put back into rows
        kept = inside * 4 * forward.packing_overhead * a + c * a
        statistics *= forward.packing_overhead
    elif widened:
        kept = inside * (5.5 if triangles == 2 else 4) * a + c * a
    else:
        # the triangle of the past reads views; that of the future reversed copies; both outputs, then side by side
        kept = c * (views + (3.5 if triangles == 2 else 1) * a) + back
        reads_views = not shared
    kept += statistics
    if model.qk_norm:
        kept += _qk_norm(forward, reads_views)
    return kept * n


def _qk_norm(forward: ForwardPass, reads_views: bool) -> float:
    """Norms of q and k: their input, which the kernel may keep already, and on the CPU copies in fp32."""
    model, c = forward.model, forward.compute_bytes
    a, rows = model.attention_size, 2 * STATISTIC * model.num_heads * len(TRIANGLES[model.attention])
    if forward.compiled or forward.on_gpu or c == STATISTIC:
        copies = 0 if forward.compiled or forward.on_gpu else 2 * STATISTIC * a
        return rows + copies + (0 if reads_views else 3 * c * a)
    return rows + 2 * 2 * STATISTIC * a


def _matrices(model: ModelConfig, vocab_size: int) -> int:
    """Elements of the matrices that autocast keeps a copy of."""
    h, a = model.hidden_size, model.attention_size
    return model.num_layers * (4 * h * a + 3 * h * model.ffn_size) + h * vocab_size


def _shared(forward: ForwardPass) -> int:
    """What all layers share: rotary tables, and the masks of windows and of the dense kernel."""
    model, n = forward.model, forward.whole_positions
    layers = model.resolved_layers
    thetas = {layer.rotary_theta for layer in layers if layer.rotary_theta is not None}
    table = forward.positions if forward.packed else math.ceil(forward.length / forward.sequence)
    # the cosines of a pair stand twice, its sines once
    total = len(thetas) * table * 3 * model.sub_head_size // 2 * STATISTIC
    triangles = len(TRIANGLES[model.attention])
    for window, kernel in {(forward.window_of(layer), forward.kernel_of(layer)) for layer in layers}:
        if kernel == "dense":
            total += triangles * n * forward.length
        elif window is not None and kernel == "sdpa":
            block = min(max(window, SMALLEST_BLOCK), n)
            sides = 3 if model.attention == "bidirectional" else 2
            total += triangles * math.ceil(n / block) * block * sides * block * forward.compute_bytes
    return total
