"""Draw the figures of the documentation, computed by the product's own code: `python docs/figures.py`."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from pretrain.batch import Batch
from pretrain.model.kernels import allowed_pairs
from pretrain.model.layout import AttentionLayout

COLOURS = ["#f4f4f2", "#d97706", "#2563eb", "#7c3aed"]
"""Not attended, past (lower), future (upper), self."""


def one_row(*lengths: int) -> AttentionLayout:
    """The layout of one row of documents of these lengths."""
    documents = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths, start=1)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return AttentionLayout.from_batch(Batch(documents, documents, documents, positions))


def draw_pairs(axes: Axes, pairs: torch.Tensor, colour: int, title: str) -> None:
    """One sub-head's pairs: queries down, keys across."""
    cells = pairs.int() * colour
    cells[torch.eye(len(cells), dtype=torch.bool) & pairs] = 3
    axes.imshow(cells, cmap=ListedColormap(COLOURS), vmin=0, vmax=3)
    axes.set_xticks(torch.arange(-0.5, len(cells)), [])
    axes.set_yticks(torch.arange(-0.5, len(cells)), [])
    axes.grid(color="white", linewidth=1.5)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="key j", ylabel="query i")


def mechanism(path: Path) -> None:
    """Two sub-heads of one logical head, and how reversal makes both of them causal."""
    layout = one_row(8)
    lower, upper = allowed_pairs(layout, "dual_triangle")[:, 0, 0]
    reversal = layout.reversal[0]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    draw_pairs(panels[0], lower, 1, "lower sub-head: past and self\n(causal as it is)")
    draw_pairs(panels[1], upper, 2, "upper sub-head: self and future")
    draw_pairs(panels[2], upper[reversal][:, reversal], 2, "upper, document reversed:\ncausal too")
    figure.savefig(path, dpi=110)


def packed(path: Path) -> None:
    """Two documents in one row: each is reversed in its own place."""
    layout = one_row(5, 3)
    lower, upper = allowed_pairs(layout, "dual_triangle")[:, 0, 0]
    reversal = layout.reversal[0]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    draw_pairs(panels[0], lower, 1, "lower, two documents in a row")
    draw_pairs(panels[1], upper, 2, "upper")
    draw_pairs(panels[2], upper[reversal][:, reversal], 2, f"upper, re-indexed by\n{reversal.tolist()}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    mechanism(folder / "mechanism.png")
    packed(folder / "packed.png")
