"""The encoder: pre-norm blocks of attention and a gated feed-forward layer, and the masked-language-model head.

B rows, L positions, h hidden width, n heads of width d, V vocabulary. RMSNorm, no biases. What a layer sees and how
it knows positions is `ModelConfig.layer`'s answer; scores are `attention`'s business.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.batch import IGNORED, Batch
from pretrain.config.model import LayerConfig, ModelConfig
from pretrain.model.attention import Kernel, attention, choose_kernel
from pretrain.model.layout import AttentionLayout
from pretrain.model.rotary import (
    RotaryScaling,
    attention_sharpness,
    rotary_frequencies,
    rotary_table,
    rotate,
    scaled_frequencies,
)

RotaryTable = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Projections around `attention`; dual-triangle needs no parameter more than the other kinds."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.config, self.window = config, window
        self.query_scale = 1.0
        """Factor of the queries, and so of every score; the evaluation sets it for rows longer than trained on."""
        self.qkv = nn.Linear(config.hidden_size, 3 * config.attention_size, bias=False)
        self.output = nn.Linear(config.attention_size, config.hidden_size, bias=False)
        # One norm for all (sub-)heads: the triangles stay exchangeable.
        self.q_norm = nn.RMSNorm(config.sub_head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.sub_head_size, eps=config.norm_eps) if config.qk_norm else None

    def project(self, x: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project [B, L, h] -> q, k, v [B, L, n, d], normalised and rotated."""
        config = self.config
        q, k, v = self.qkv(x).unflatten(-1, (3, config.num_heads, config.head_size)).unbind(-3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (_on_sub_heads(norm, t, config) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        if rotary is not None:
            q, k = (_on_sub_heads(partial(rotate, table=rotary), t, config) for t in (q, k))
        return (q if self.query_scale == 1 else q * self.query_scale), k, v


def _on_sub_heads(f: Callable[[Tensor], Tensor], x: Tensor, config: ModelConfig) -> Tensor:
    """Apply `f` to each head of [B, L, n, d], or under dual-triangle attention to each sub-head for itself."""
    if config.attention != "dual_triangle":
        return f(x)
    sub_heads = x.unflatten(-1, (2, config.sub_head_size)).flatten(2, 3)
    return f(sub_heads).unflatten(2, (config.num_heads, 2)).flatten(-2)


class GatedFeedForward(nn.Module):
    """SwiGLU or GEGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(config.hidden_size, 2 * config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)
        self.activation = F.silu if config.glu == "swiglu" else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, h] -> [B, L, h]."""
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    In the U-net form (Ronneberger et al., arXiv 1505.04597; for encoders as in arXiv 2604.18603) x is first mixed with
    the input embedding and, in the second half of the encoder, with the output of the mirrored block.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = SelfAttention(config, config.layer(index).window)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = GatedFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        # The block's weights of (x, the input embedding, the mirrored block): the plain encoder at first.
        mirrored = index >= (config.num_layers + 1) // 2
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0, 0.0][: 3 if mirrored else 2])) if config.unet else None

    def forward(
        self,
        x: Tensor,
        layout: AttentionLayout,
        rotary: RotaryTable | None,
        kernel: Kernel,
        skips: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Map [B, L, h] -> [B, L, h]; `skips` are the tensors besides x that `mix` weighs."""
        x, q, k, v = self.before_attention(x, rotary, skips)
        config = self.attention.config
        return self.after_attention(x, attention(q, k, v, layout, config.attention, kernel, self.attention.window))

    def before_attention(
        self, x: Tensor, rotary: RotaryTable | None, skips: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x as mixed, and q, k, v. What lies before and after attention is compiled, attention itself is not."""
        if self.mix is not None:
            x = self.mix[0] * x
            for number, source in enumerate(skips, start=1):
                x = x + self.mix[number] * source
        return x, *self.attention.project(self.attention_norm(x), rotary)

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Finish the block from what attention made, [B, L, n, d]."""
        x = x + self.dropout(self.attention.output(mixed.flatten(-2)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Encoder(nn.Module):
    """Stack of blocks: token ids -> hidden states.

    These may be set at any time, and touch no weight:
        rotary_scaling: how to read rows longer than those trained on. It reaches the layers that see that far: global
            ones, and windows wider than the trained length.
        rotary_theta: a base of the rotary frequencies in place of every layer's own.
        positions_dropped: no rotary positions; `set_tokens_seen` sets it.
        checkpoint_every: compute every k-th block again in the backward pass; 0 for none.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.rotary_scaling: RotaryScaling | None = None
        self.rotary_theta: float | None = None
        self.positions_dropped = False
        self.checkpoint_every = 0
        self.layers = config.resolved_layers
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embedding = (
            nn.Embedding(config.max_positions, config.hidden_size) if config.positions == "learned" else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def set_tokens_seen(self, tokens_seen: int) -> None:
        """Drop the positions if the config says so after this many tokens, which nothing else decides."""
        after = self.config.drop_positions_after
        self.positions_dropped = after is not None and tokens_seen >= after

    def forward(self, input_ids: Tensor, layout: AttentionLayout, at: Tensor | None = None) -> Tensor:
        """Encode int64 [B, L] -> [B, L, h]; L/S positions each where the layout says that S ranks share the rows.

        With `at`, bool [B, L], only the M positions where it is true -> [M, h], in row-major order.

        Raises:
            ValueError: learned positions, and a row longer than there are.
        """
        x = self.embedding(input_ids)
        if self.position_embedding is not None:
            if (length := layout.position_ids.shape[1]) > self.config.max_positions:
                raise ValueError(f"a row of {length} positions is beyond the {self.config.max_positions} learned ones")
            x = x + self.position_embedding(layout.own(layout.position_ids))
        x = self.dropout(x)
        tables = self._rotary_tables(layout)
        embedded = x
        outputs: list[Tensor] = []
        for index, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            skips: tuple[Tensor, ...] = ()
            if self.config.unet:
                mirrored = len(self.blocks) - 1 - index
                skips = (embedded, outputs[mirrored]) if mirrored < index else (embedded,)
            run: Callable[..., Tensor] = block
            if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
                run = partial(checkpoint, block, use_reentrant=False)
            x = run(x, layout, tables[layer], self._kernel(x, layout, layer), skips)
            if self.config.unet:
                outputs.append(x)
        return self.norm(x if at is None else x[at])

    def _kernel(self, x: Tensor, layout: AttentionLayout, layer: LayerConfig) -> Kernel:
        """Return the config's kernel; what `auto` means is decided here, outside of what is compiled."""
        if self.config.kernel != "auto":
            return self.config.kernel
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return choose_kernel(x.device, dtype, self.config.sub_head_size, layout, layer.window)

    def _rotary_tables(self, layout: AttentionLayout) -> dict[LayerConfig, RotaryTable | None]:
        """Return the table of each layer; layers with the same frequencies share one."""
        tables: dict[LayerConfig, RotaryTable | None] = {}
        for layer in dict.fromkeys(self.layers):
            if layer.rotary_theta is None or self.positions_dropped:
                tables[layer] = None
                continue
            theta, scaling = self.rotary_theta or layer.rotary_theta, self.rotary_scaling
            if scaling is not None and layer.window is not None and layer.window <= scaling.trained_length:
                scaling = None
            tables[layer] = layout.once(
                ("rotary", self.config.sub_head_size, theta, scaling),
                partial(self._rotary_table, layout, theta, scaling),
            )
        return tables

    def _rotary_table(self, layout: AttentionLayout, theta: float, scaling: RotaryScaling | None) -> RotaryTable:
        positions, width = layout.position_ids, self.config.sub_head_size
        if layout.one_document_per_row:
            positions = torch.arange(positions.shape[1], device=positions.device)[None]
        length, positions = positions.shape[1], layout.own(positions)
        if scaling is None:
            return rotary_table(positions, rotary_frequencies(width, theta, positions.device))
        frequencies = scaled_frequencies(width, theta, scaling, length, positions.device)
        return rotary_table(positions, frequencies, attention_sharpness(scaling))


class MaskedLanguageModel(nn.Module):
    """Encoder with an output matrix; logits are computed at masked positions only."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`whole` makes a parameter whole while it is drawn, where it is spread over ranks as soon as it is made."""
        super().__init__()
        self.z_loss = config.z_loss
        # The output multiplier of arXiv 2203.03466, table 8; on the hidden states, of which there are fewer.
        self.output_scale = 1 / config.width_ratio
        self.encoder = Encoder(config, vocab_size)
        self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.encoder.embedding.weight
        self._initialize(config, whole)

    def _initialize(self, config: ModelConfig, whole: Callable[[nn.Parameter], AbstractContextManager[object]]) -> None:
        """Draw normal weights; projections back into the residual stream smaller, as in GPT-2 (Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            into_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
            scale = (2 * config.num_layers) ** -0.5 if into_residual and config.depth_scaled_init else 1.0
            outer = "embedding" in name or name == "head.weight"
            with whole(parameter):
                if parameter.ndim >= 2:
                    nn.init.normal_(parameter, std=(config.embedding_std if outer else config.initial_std) * scale)

    def forward(self, batch: Batch, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Returns:
            The loss in nats of each masked position, float32 [M], in row-major order, and whether the most likely id
            is the right one, bool [M]; of this rank's positions, where the layout says that ranks share the rows.
            In training the z-loss is in the gradient of the loss, not in its value.
        """
        masked = batch.labels != IGNORED
        hidden = self.encoder(batch.input_ids, layout, at=masked)
        logits = self.head(hidden * self.output_scale).float()
        labels = batch.labels[masked]
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self.z_loss and self.training:
            penalty = self.z_loss * logits.logsumexp(dim=-1).square()
            losses = losses + (penalty - penalty.detach())
        return losses, logits.argmax(dim=-1) == labels
