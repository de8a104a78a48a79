"""Floating-point operations of an encoder, from its shape; a multiply and an add are two."""

from dataclasses import dataclass

from pretrain.config.model import ModelConfig

PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}
"""FLOP/s in dense bf16 without sparsity, from the makers' data sheets."""


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs of forward and backward pass, per token that goes through the encoder."""

    matrices: float
    """Projections and feed-forward layers."""
    attention: float
    """Scores and weighted sums, counting only the pairs that the triangles and windows hold."""
    attention_as_full: float
    """The same, counted as if every position attended to every other."""
    head_per_masked_token: float
    """The output matrix, per masked token."""

    def total(self, mask_rate: float) -> float:
        """FLOPs per token, with triangles counted as triangles."""
        return self.matrices + self.attention + mask_rate * self.head_per_masked_token

    def total_as_full(self, mask_rate: float) -> float:
        """FLOPs per token, with triangles counted as full attention."""
        return self.matrices + self.attention_as_full + mask_rate * self.head_per_masked_token


def flops_per_token(model: ModelConfig, vocab_size: int, sequence_length: int) -> FlopsPerToken:
    """Training FLOPs per token: the backward pass costs twice the forward pass."""
    h = model.hidden_size
    parameters = model.num_layers * (4 * h * model.attention_size + 3 * h * model.ffn_size)
    per_key = 4 * model.attention_size
    keys = sum(keys_per_query(model, layer.window, sequence_length) for layer in model.resolved_layers)
    return FlopsPerToken(
        matrices=3 * 2 * parameters,
        attention=3 * per_key * keys,
        attention_as_full=3 * per_key * model.num_layers * sequence_length,
        head_per_masked_token=3 * 2 * h * vocab_size,
    )


def keys_per_query(model: ModelConfig, window: int | None, sequence_length: int) -> float:
    """Keys that a query of a (sub-)head attends to, on average over a row of one document."""
    reach = min(window or sequence_length, sequence_length)
    # The first queries of a triangle see 1, 2, ... reach keys, all others `reach`.
    one_side = reach - reach * (reach - 1) / (2 * sequence_length)
    return 2 * one_side - 1 if model.attention == "bidirectional" else one_side


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, None where it is not known (every CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
