"""Floating-point operations of an encoder, from its shape; a multiply and an add are two."""

from dataclasses import dataclass

from pretrain.config import ModelConfig

# Dense bf16 peaks without sparsity, in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward, per token that goes through the encoder."""

    matrices: float
    """Projections and feed-forward layers."""
    attention: float
    """Scores and weighted sums, counting only the pairs that the triangles hold."""
    attention_as_full: float
    """The same, counted as if every position attended to every other."""
    head_per_masked_token: float
    """The output matrix, per masked token."""

    def total(self, mask_rate: float) -> float:
        """Per token, with triangles counted as triangles."""
        return self.matrices + self.attention + mask_rate * self.head_per_masked_token

    def total_as_full(self, mask_rate: float) -> float:
        """Per token, with triangles counted as full attention."""
        return self.matrices + self.attention_as_full + mask_rate * self.head_per_masked_token


def flops_per_token(model: ModelConfig, vocab_size: int, sequence_length: int) -> FlopsPerToken:
    """Training FLOPs per token: the backward pass costs twice the forward pass."""
    h = model.hidden_size
    parameters = model.num_layers * (4 * h * h + 3 * h * model.ffn_size)
    full = model.num_layers * 4 * sequence_length * h
    pairs = 1.0 if model.attention == "bidirectional" else (sequence_length + 1) / (2 * sequence_length)
    return FlopsPerToken(
        matrices=3 * 2 * parameters,
        attention=3 * full * pairs,
        attention_as_full=3 * full,
        head_per_masked_token=3 * 2 * h * vocab_size,
    )


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, None where it is not known (every CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
