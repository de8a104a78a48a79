"""`diptych model show`: what a config's encoder is made of and what it costs, before anything is built."""

from rich.console import Console

from launch.display import say
from launch.tables import flops_table, model_tables, optimizer_table
from pretrain.config import RunConfig, load_config
from pretrain.data.manifest import MANIFEST, load_manifest
from pretrain.data.tokenizer import RESIDUES, SPECIAL_PIECES
from pretrain.model.summary import summarize
from pretrain.training.flops import flops_per_token
from pretrain.training.planning import optimizer_shape


def show_model(name: str, overrides: list[str], console: Console) -> None:
    """Print parameters, heads, layers and FLOPs of a config, which need not name a corpus."""
    config = load_config(name, overrides, beneath={"corpus": {"path": "corpora/none"}})
    vocab_size, origin = vocabulary(config)
    summary = summarize(config.model, vocab_size)
    console.print(model_tables(summary, f"{config.name}: {config.model.attention.replace('_', '-')} encoder"))
    shape = optimizer_shape(config.model, vocab_size, config.optimizer)
    console.print(optimizer_table(shape.summaries))
    length, mask_rate = config.data.sequence_length, config.data.mask_rate
    flops = flops_per_token(config.model, vocab_size, length)
    console.print(flops_table(flops, length, mask_rate))
    say(console, f"vocabulary: {vocab_size:,} pieces, {origin}")


def vocabulary(config: RunConfig) -> tuple[int, str]:
    """The number of pieces, and where it is known from: the corpus, if it is built, or else the config."""
    if (config.corpus.path / MANIFEST).is_file():
        return load_manifest(config.corpus.path).tokenizer.vocab_size, f"of the corpus {config.corpus.path}"
    if config.corpus.tokenizer.kind == "protein":
        return len(SPECIAL_PIECES) + len(RESIDUES), "of the protein alphabet"
    return config.corpus.tokenizer.vocab_size, "by corpus.tokenizer.vocab_size (the corpus is not built)"
