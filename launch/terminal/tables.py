"""Tables for a terminal, made of what other parts report. Nothing is measured or read here."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launch.terminal.console import compact
from pretrain.data.manifest import SPLITS, Manifest, SourceEntry, SplitEntry

if TYPE_CHECKING:
    from pretrain.data.inspection import CorpusDescription
    from pretrain.model.summary import ModelSummary
    from pretrain.training.cost.flops import FlopsPerToken
    from pretrain.training.zero.optimizer import GroupSummary

BAR_WIDTH = 30


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, numbers_from: int = 1
) -> Table:
    """A plain table; columns from `numbers_from` on are aligned to the right. Brackets in a cell are no markup."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for position, column in enumerate(columns):
        made.add_column(column, justify="right" if position >= numbers_from else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def fitting_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], dispensable: str
) -> Table:
    """A table, without the columns headed `dispensable` where the console is too narrow for them."""
    made = table(title, columns, rows)
    if Measurement.get(console, console.options.update(max_width=1000), made).maximum <= console.width:
        return made
    kept = [position for position, column in enumerate(columns) if column != dispensable]
    return table(title, [columns[k] for k in kept], [[row[k] for k in kept] for row in rows])


def number(value: float | None, form: str = ".3f") -> str:
    """A value that may not be known yet."""
    return "-" if value is None else format(value, form)


def corpus_summary(manifest: Manifest) -> Group:
    """What a corpus is made of: sources and splits."""
    tokenizer = manifest.tokenizer
    title = f"Corpus {manifest.fingerprint[:12]}, tokenizer {tokenizer.kind} with {tokenizer.vocab_size:,} pieces"
    sources = table(
        title,
        ["source", "files", "documents", "characters", "left out"],
        ([s.name, f"{s.files:,}", f"{s.documents:,}", compact(s.characters), _skipped(s)] for s in manifest.sources),
    )
    splits = table(
        None,
        ["split", "documents", "characters", "tokens", "characters per token", "shards"],
        ([name, *_split_cells(split)] for name, split in manifest.splits.items()),
    )
    return Group(sources, splits)


def _skipped(source: SourceEntry) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in source.skipped.items()) or "0"


def _split_cells(split: SplitEntry) -> list[str]:
    per_token = split.characters / split.tokens if split.tokens else None
    counts = [f"{split.documents:,}", compact(split.characters), compact(split.tokens)]
    return [*counts, number(per_token, ".2f"), f"{len(split.shards):,}"]


def corpus_description(description: "CorpusDescription") -> Group:
    """`diptych data show`."""
    manifest = description.manifest
    facts = Text(
        f"characters per token: {description.characters_per_token:.2f}\n"
        f"unigram entropy: {description.unigram_entropy:.3f} nats (the loss of a model that knows only how often each "
        "token occurs)\n"
    )
    examples = [Text(f"[{number}] {text!r}") for number, text in enumerate(description.examples, start=1)]
    head = Text("How some training documents begin", style="bold")
    return Group(corpus_summary(manifest), facts, _length_table(manifest), head, *examples, Text(str(description.path)))


def _length_table(manifest: Manifest) -> Table:
    """Documents by their number of tokens, with a bar for the training split."""
    histograms = [manifest.splits[split].length_histogram for split in SPLITS]
    bounds = sorted({bound for histogram in histograms for bound in histogram})
    most = max(histograms[0].values(), default=1)
    rows = []
    for bound in bounds:
        counts = [histogram.get(bound, 0) for histogram in histograms]
        bar = "█" * -(-counts[0] * BAR_WIDTH // most)
        rows.append([f"{bound // 2 + 1:,} to {bound:,}" if bound > 1 else "up to 1", *(f"{n:,}" for n in counts), bar])
    made = table("Documents by length", ["tokens", *SPLITS, ""], rows, numbers_from=0)
    made.columns[-1].justify = "left"
    return made


def model_tables(summary: "ModelSummary", title: str) -> Group:
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


def optimizer_table(groups: Sequence["GroupSummary"]) -> Table:
    """Who moves which parameters, and how far."""
    rows = (
        [g.name, g.optimizer, f"{g.tensors:,}", f"{g.parameters:,}", f"{g.learning_rate:.4g}", f"{g.weight_decay:.4g}"]
        for g in groups
    )
    columns = ["optimizer", "by", "tensors", "number", "peak learning rate", "weight decay"]
    return table(None, columns, rows, numbers_from=2)


def flops_table(flops: "FlopsPerToken", sequence_length: int, mask_rate: float) -> Table:
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
