"""The logits that a checkpoint carries: a few fixed tokens, put through the model when it is saved.

Whoever rebuilds the model from the checkpoint, in another program or years later, can tell whether it still computes
the same. What a run's config says of the model may change between phases; so what the logits were computed under is
stored beside them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.batch import IGNORED, Batch
from pretrain.checkpoint.format import LOGITS_FILE, brief
from pretrain.errors import UserError
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout

TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "autocast": 0.05}
"""Largest allowed difference, as a share of the largest logit: what kernels and devices round differently."""
EMBEDDING = "encoder.embedding.weight"
POSITIONS, EVERY = 16, 4
"""Length of the one row, and of how many positions one is predicted."""
PRECISIONS = ("fp32", "bf16", "autocast")
"""How logits were computed: fp32; bf16 weights and activations; bf16 under autocast over fp32 weights."""


@dataclass(frozen=True)
class SavedLogits:
    """Tokens, their logits, and how these were computed."""

    input_ids: Tensor
    """int64 [1, P]."""
    logits: Tensor
    """float32 [M, vocabulary], of M of the positions."""
    precision: str
    """One of PRECISIONS."""
    rotary_theta: float | None
    """Rotary base in place of every layer's own."""
    positions_dropped: bool

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the file that holds them."""
        return {"input_ids": self.input_ids, "logits": self.logits}

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the same file."""
        theta = "" if self.rotary_theta is None else repr(self.rotary_theta)
        return {
            "precision": self.precision,
            "rotary_theta": theta,
            "positions_dropped": str(int(self.positions_dropped)),
        }


def read_logits(path: Path) -> SavedLogits:
    """The logits in a checkpoint.

    Raises:
        ValueError: they are not what a save writes.
    """
    try:
        with safe_open(path / LOGITS_FILE, framework="pt") as file:
            metadata = file.metadata()
            input_ids, logits = (file.get_tensor(name) for name in ("input_ids", "logits"))
        theta = float(metadata["rotary_theta"]) if metadata["rotary_theta"] else None
        saved = SavedLogits(input_ids, logits, metadata["precision"], theta, metadata["positions_dropped"] == "1")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{LOGITS_FILE} does not hold logits ({brief(error)})") from error
    kinds = (input_ids.dtype, logits.dtype, input_ids.ndim, logits.ndim)
    if kinds != (torch.int64, torch.float32, 2, 2) or saved.precision not in PRECISIONS:
        raise ValueError(f"{LOGITS_FILE} does not hold logits")
    return saved


def model_logits(model: MaskedLanguageModel, saved: SavedLogits) -> Tensor:
    """What a model computes for the saved tokens, under the same settings, which stay with it; on the CPU."""
    model.encoder.rotary_theta, model.encoder.positions_dropped = saved.rotary_theta, saved.positions_dropped
    if saved.precision == "bf16":
        model = model.bfloat16()
    batch = fixed_batch(saved.input_ids)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if saved.precision == "autocast" else nullcontext()
    with torch.no_grad(), autocast, caught_output(model.eval().head) as caught:
        model(batch, AttentionLayout.from_batch(batch))
    return caught[0]


def compare_logits(saved: SavedLogits, computed: Tensor) -> tuple[float, float]:
    """The largest difference between logits, and how large it may be."""
    if saved.logits.shape != computed.shape:
        return float("inf"), 0.0
    largest = float((saved.logits - computed).abs().nan_to_num(nan=float("inf")).max())
    return largest, TOLERANCE[saved.precision] * max(1.0, float(saved.logits.abs().max()))


def load_logits(path: Path) -> SavedLogits:
    """The logits in a verified checkpoint.

    Raises:
        UserError: there are none.
    """
    try:
        return read_logits(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def fixed_batch(input_ids: Tensor) -> Batch:
    """One document, every `EVERY`th position of which is to be predicted."""
    columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    labels = torch.where(columns % EVERY == 0, input_ids, IGNORED)
    return Batch(input_ids, labels, torch.ones_like(input_ids), columns.contiguous())


@contextmanager
def caught_output(head: nn.Module) -> Iterator[list[Tensor]]:
    """The output of a module, which may be sharded, in a list: `MaskedLanguageModel` returns losses only."""
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach().float().cpu()))
    try:
        yield outputs
    finally:
        handle.remove()
