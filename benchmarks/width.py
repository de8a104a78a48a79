"""Coordinate check of the parametrizations over widths: `python -m benchmarks.width` (a minute on two cores).

Trains a small encoder of each width for a few steps on one batch and measures how far each part of it has moved from
its beginning (Yang et al., arXiv 2203.03466, appendix D.1). Where one learning rate serves all widths, lines are flat.
Writes results/width.json and docs/images/coordinate-check.png, or with `--optimizer muon` results/width-muon.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.timing import command, machine
from pretrain.batch import IGNORED, Batch
from pretrain.config.model import ModelConfig
from pretrain.config.training import OptimizerConfig
from pretrain.files import write_json
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.training.zero.optimizer import build_optimizer

KINDS = ("standard", "mup")
WIDTHS = (64, 128, 256, 512, 1024)
PARTS = ("attention", "feed-forward", "last hidden state", "logits")
VOCAB, ROWS, LENGTH, HEAD = 256, 4, 32, 32


def model_of(kind: str, width: int) -> MaskedLanguageModel:
    """Two layers, heads of one width, the smallest width as the base."""
    shape = {"hidden_size": width, "num_layers": 2, "num_heads": width // HEAD, "base_width": WIDTHS[0]}
    torch.manual_seed(0)
    return MaskedLanguageModel(ModelConfig.model_validate({**shape, "parametrization": kind}), VOCAB)


def batch() -> Batch:
    """Random rows, every fifth position masked."""
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    columns = torch.arange(LENGTH).expand(ROWS, LENGTH)
    return Batch(ids, torch.where(columns % 5 == 0, ids, IGNORED), torch.ones_like(ids), columns)


def outputs(model: MaskedLanguageModel, rows: Batch) -> dict[str, Tensor]:
    """What each part of the model puts out."""
    seen: dict[str, Tensor] = {}

    def record(name: str):
        def hook(_module: object, _inputs: object, output: Tensor) -> None:
            seen[name] = output.detach().float()

        return hook

    last = model.encoder.blocks[-1]
    parts = (last.attention.output, last.ffn, model.encoder.norm, model.head)
    hooks = [part.register_forward_hook(record(name)) for name, part in zip(PARTS, parts, strict=True)]
    with torch.no_grad():
        model(rows, AttentionLayout.from_batch(rows))
    for hook in hooks:
        hook.remove()
    return seen


def movement(
    kind: str, width: int, steps: int, learning_rate: float, optimizer_kind: Literal["adamw", "muon"] = "adamw"
) -> dict[str, float]:
    """Root mean square of the change of each part's output in `steps` steps of the optimizer."""
    model, rows = model_of(kind, width), batch()
    optimizer = build_optimizer(model, OptimizerConfig(kind=optimizer_kind, learning_rate=learning_rate))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    before = outputs(model, rows)
    for _ in range(steps):
        optimizer.zero_grad()
        model(rows, AttentionLayout.from_batch(rows))[0].mean().backward()
        optimizer.step()
    after = outputs(model, rows)
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in PARTS}


def slopes(widths: Sequence[int], moved: Sequence[dict[str, float]]) -> dict[str, float]:
    """By how many powers of the width each part's movement grows: the slope on logarithmic axes."""
    x = torch.tensor(widths).log2()
    x = x - x.mean()
    result = {}
    for name in PARTS:
        y = torch.tensor([part[name] for part in moved]).log2()
        result[name] = float((x * (y - y.mean())).sum() / (x * x).sum())
    return result


def draw(path: Path, widths: Sequence[int], moved: dict[str, list[dict[str, float]]]) -> None:
    """One panel for each parametrization."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind in zip(panels, KINDS, strict=True):
        for name in PARTS:
            panel.loglog(widths, [part[name] for part in moved[kind]], marker="o", markersize=3, label=name)
        panel.set(title=kind, xlabel="hidden size")
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
    panels[0].set_ylabel("change of the output (RMS)")
    panels[1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="only adamw is drawn")
    parser.add_argument("--largest", type=int, default=WIDTHS[-1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/coordinate-check.png"))
    chosen = parser.parse_args()
    on = machine()
    how = chosen.steps, chosen.learning_rate, chosen.optimizer
    widths = [width for width in WIDTHS if width <= chosen.largest]
    moved = {kind: [movement(kind, width, *how) for width in widths] for kind in KINDS}
    grows = {kind: slopes(widths, moved[kind]) for kind in KINDS}
    settings = {
        "optimizer": chosen.optimizer,
        "steps": chosen.steps,
        "learning_rate": chosen.learning_rate,
        "widths": widths,
    }
    record = {"format": 1, "machine": on, "command": command(), **settings, "moved": moved, "slopes": grows}
    name = "width.json" if chosen.optimizer == "adamw" else f"width-{chosen.optimizer}.json"
    write_json(chosen.out / name, record)
    if chosen.optimizer == "adamw":
        draw(chosen.plot, widths, moved)
    for kind in KINDS:
        print(kind, {name: round(slope, 2) for name, slope in grows[kind].items()})


if __name__ == "__main__":
    main()
