"""`diptych model show`: parameters, heads, layers and FLOPs of an encoder, as tables."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table

from launch.preparation import vocabulary_of
from launch.terminal.console import compact, say
from launch.terminal.tables import table
from pretrain.config.load import load_config
from pretrain.model.summary import ModelSummary, summarize
from pretrain.training.cost.flops import FlopsPerToken, flops_per_token
from pretrain.training.cost.need import optimizer_shape
from pretrain.training.zero.optimizer import GroupSummary


def show_model(name: str, overrides: list[str], console: Console) -> None:
    """Print parameters, heads, layers and FLOPs of a config, which need not name a corpus."""
    config = load_config(name, overrides, beneath={"corpus": {"path": "corpora/none"}})
    vocab_size, origin = vocabulary_of(config)
    summary = summarize(config.model, vocab_size)
    console.print(model_tables(summary, f"{config.name}: {config.model.attention.replace('_', '-')} encoder"))
    shape = optimizer_shape(config.model, vocab_size, config.optimizer)
    console.print(optimizer_table(shape.summaries))
    length, mask_rate = config.data.sequence_length, config.data.mask_rate
    flops = flops_per_token(config.model, vocab_size, length)
    console.print(flops_table(flops, length, mask_rate))
    say(console, f"vocabulary: {vocab_size:,} pieces, {origin}")


def model_tables(summary: ModelSummary, title: str) -> Group:
    """Parameters, heads and layers of `diptych model show`."""
    rows = [
        ["head", "-", "the embedding", "-"]
        if summary.tied and group.name == "head"
        else [group.name, f"{group.tensors:,}", f"{group.parameters:,}", f"{group.parameters / summary.parameters:.1%}"]
        for group in summary.groups
    ]
    total = ["all", f"{sum(group.tensors for group in summary.groups):,}", f"{summary.parameters:,}", ""]
    parameters = table(title, ["parameters", "tensors", "number", "share"], [*rows, total])
    heads = summary.heads
    split = len(heads.triangles) > 1
    sub_heads = [[f"{n} sub-heads", f"{heads.logical}", f"{heads.sub_head_width}", t] for n, t in heads.triangles]
    whole = ["logical heads", f"{heads.logical}", f"{heads.width}", "all of these" if split else heads.triangles[0][1]]
    columns = ["heads", "number", "width", "each attends to"]
    layout = table(None, columns, [*sub_heads, whole] if split else [whole])
    layout.columns[-1].justify = "left"
    layers = (
        [f"{g.first} to {g.last}" if g.last > g.first else f"{g.first}", g.span, g.positions] for g in summary.layers
    )
    return Group(parameters, layout, table(None, ["layers", "span", "positions"], layers, numbers_from=3))


def optimizer_table(groups: Sequence[GroupSummary]) -> Table:
    """Who moves which parameters, and how far."""
    rows = (
        [g.name, g.optimizer, f"{g.tensors:,}", f"{g.parameters:,}", f"{g.learning_rate:.4g}", f"{g.weight_decay:.4g}"]
        for g in groups
    )
    columns = ["optimizer", "by", "tensors", "number", "peak learning rate", "weight decay"]
    return table(None, columns, rows, numbers_from=2)


def flops_table(flops: FlopsPerToken, sequence_length: int, mask_rate: float) -> Table:
    """What a training token costs, with triangles counted as triangles and as full attention."""
    head = mask_rate * flops.head_per_masked_token
    rows = [
        ("projections and feed-forward", flops.matrices, flops.matrices),
        ("attention", flops.attention, flops.attention_as_full),
        (f"head, {mask_rate:.0%} of the tokens masked", head, head),
        ("all", flops.total(mask_rate), flops.total_as_full(mask_rate)),
    ]
    return table(
        f"Training FLOPs per token (forward and backward) at length {sequence_length:,}",
        ["", "pairs attended to", "counted as full attention"],
        ([name, compact(exact), compact(as_full)] for name, exact, as_full in rows),
    )
