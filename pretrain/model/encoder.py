"""The encoder: pre-norm blocks of attention and SwiGLU, and the masked-language-model head.

B rows, L positions, h hidden width, n heads of width d, V vocabulary. RMSNorm, no biases, no dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import IGNORED, Batch
from pretrain.config import ModelConfig
from pretrain.model.attention import attention
from pretrain.model.layout import AttentionLayout
from pretrain.model.rotary import rotary_frequencies, rotary_table, rotate

RotaryTable = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Multi-head projections around `attention`; dual-triangle needs no parameter more than the other kinds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layout: AttentionLayout, rotary: RotaryTable | None) -> Tensor:
        """[B, L, h] -> [B, L, h]."""
        config = self.config
        q, k, v = self.qkv(x).unflatten(-1, (3, config.num_heads, config.head_dim)).unbind(-3)
        if rotary is not None:
            q, k = (_rotate_heads(t, rotary, config) for t in (q, k))
        mixed = attention(q, k, v, layout, config.attention, config.kernel)
        return self.output(mixed.flatten(-2))


def _rotate_heads(x: Tensor, table: RotaryTable, config: ModelConfig) -> Tensor:
    """Rotate each head, or under dual-triangle attention each sub-head on its own dimensions, of [B, L, n, d]."""
    if config.attention != "dual_triangle":
        return rotate(x, table)
    sub_heads = x.unflatten(-1, (2, config.head_dim // 2)).flatten(2, 3)
    return rotate(sub_heads, table).unflatten(2, (config.num_heads, 2)).flatten(-2)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(config.hidden_size, 2 * config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, h] -> [B, L, h]."""
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = SelfAttention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, layout: AttentionLayout, rotary: RotaryTable | None) -> Tensor:
        """[B, L, h] -> [B, L, h]."""
        x = x + self.attention(self.attention_norm(x), layout, rotary)
        return x + self.ffn(self.ffn_norm(x))


class Encoder(nn.Module):
    """Token ids -> hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embedding = (
            nn.Embedding(config.max_positions, config.hidden_size) if config.positions == "learned" else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor, layout: AttentionLayout) -> Tensor:
        """int64 [B, L] -> [B, L, h].

        Raises:
            ValueError: learned positions, and a row longer than there are.
        """
        x = self.embedding(input_ids)
        if self.position_embedding is not None:
            if input_ids.shape[1] > self.config.max_positions:
                raise ValueError(
                    f"a row of {input_ids.shape[1]} positions is beyond the {self.config.max_positions} learned ones"
                )
            x = x + self.position_embedding(layout.position_ids)
        rotary = self._rotary_table(layout) if self.config.positions == "rotary" else None
        for block in self.blocks:
            x = block(x, layout, rotary)
        return self.norm(x)

    def _rotary_table(self, layout: AttentionLayout) -> RotaryTable:
        positions = layout.position_ids
        if layout.one_document_per_row:
            positions = torch.arange(positions.shape[1], device=positions.device)[None]
        width = self.config.head_dim // 2 if self.config.attention == "dual_triangle" else self.config.head_dim
        return rotary_table(positions, rotary_frequencies(width, self.config.rotary_theta, positions.device))


class MaskedLanguageModel(nn.Module):
    """Encoder and output matrix; logits are computed at masked positions only."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(config, vocab_size)
        self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.encoder.embedding.weight
        self._initialize(config)

    def _initialize(self, config: ModelConfig) -> None:
        """Normal weights; the projections back into the residual stream smaller, as in GPT-2 (Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            into_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
            scale = (2 * config.num_layers) ** -0.5 if into_residual else 1.0
            nn.init.normal_(parameter, std=config.initial_std * scale)

    def forward(self, batch: Batch, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Returns:
            The loss in nats of each masked position, float32 [M], in row-major order, and whether the most likely id
            is the right one, bool [M].
        """
        hidden = self.encoder(batch.input_ids, layout)
        masked = batch.labels != IGNORED
        logits = self.head(hidden[masked]).float()
        labels = batch.labels[masked]
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels
