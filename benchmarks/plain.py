"""The same network as Diptych's, without Diptych: what a plain PyTorch training loop would hold.

Pre-norm blocks of rotary self-attention and SwiGLU, bidirectional, through `scaled_dot_product_attention`; a tied head
at masked positions. As many parameters of the same shapes, so that a step of either costs the same matrix products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import IGNORED, Batch
from pretrain.config.model import ModelConfig


class PlainBlock(nn.Module):
    """Attention, then a feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h, self.heads = config.hidden_size, config.num_heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(h), nn.RMSNorm(h)
        self.qkv = nn.Linear(h, 3 * h, bias=False)
        self.output = nn.Linear(h, h, bias=False)
        self.gate_and_up = nn.Linear(h, 2 * config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, L, h] -> [B, L, h]."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        gate, up = self.gate_and_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainEncoder(nn.Module):
    """Token ids and labels -> the mean loss at masked positions."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        width = config.hidden_size // config.num_heads
        self.register_buffer("frequencies", config.rotary_theta ** -(torch.arange(0, width, 2) / width))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """int64 [B, L] twice -> float32 []."""
        angles = torch.outer(torch.arange(input_ids.shape[1], device=input_ids.device), self.frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        masked = (labels != IGNORED).nonzero(as_tuple=True)
        return F.cross_entropy(F.linear(self.norm(x[masked]), self.embedding.weight), labels[masked])


class PlainLoop:
    """Forward, backward, clipping, fused AdamW; bf16 by autocast on a GPU, fp32 on a CPU."""

    def __init__(self, config: ModelConfig, vocab_size: int, device: torch.device, compiled: bool) -> None:
        self.model = PlainEncoder(config, vocab_size).to(device)
        self._forward = torch.compile(self.model) if compiled else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self._device = device

    def step(self, batch: Batch) -> None:
        """One update."""
        ids, labels = batch.input_ids.to(self._device), batch.labels.to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = self._forward(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
