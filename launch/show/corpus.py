"""What a corpus is made of, as tables."""

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launch.terminal.console import compact
from launch.terminal.tables import number, table
from pretrain.data.manifest import SPLITS, Manifest, SourceEntry, SplitEntry

if TYPE_CHECKING:
    from pretrain.data.inspection import CorpusDescription

BAR_WIDTH = 30


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
