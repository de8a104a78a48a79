"""The corpus of a run: checked, or built first."""

from rich.console import Console

from launch.terminal.console import say
from launch.terminal.progress import StageProgress
from pretrain.config.data import CorpusConfig
from pretrain.data.manifest import MANIFEST, Manifest, load_manifest
from pretrain.errors import UserError
from pretrain.redaction import redact


def build(corpus: CorpusConfig, console: Console, part: int | None = None, parts: int | None = None) -> Manifest:
    """Build the corpus, with progress; one of its `parts`, or, where it is not said which, join them."""
    from pretrain.data.build.corpus import build_corpus
    from pretrain.data.build.parts import build_part, join_parts

    with StageProgress(console) as progress:
        if parts is None:
            return build_corpus(corpus, progress.report_text)
        return join_parts(corpus, parts) if part is None else build_part(corpus, part, parts, progress.report_text)


def ensure_corpus(corpus: CorpusConfig, console: Console) -> Manifest:
    """The corpus's manifest; built first if it is not there and there are sources to build it from.

    Raises:
        UserError: there is no corpus and nothing to build it from, it is not what its manifest says, or it was built
            from other sources or settings than the config's.
    """
    if corpus.url and not (corpus.path / MANIFEST).is_file():
        from pretrain.data.shards.remote import fetch_description

        say(console, f"fetching the manifest of {redact(corpus.url)} to {corpus.path}")
        fetch_description(corpus.url, corpus.path)
    if corpus.sources and not (corpus.path / MANIFEST).is_file():
        say(console, f"there is no finished corpus at {corpus.path} yet: building it")
        return build(corpus, console)
    manifest = load_manifest(corpus.path)
    if corpus.sources and manifest.build_key is not None:
        _check_sources(corpus, manifest.build_key)
    return manifest


def _check_sources(corpus: CorpusConfig, key: str) -> None:
    """Refuse a corpus of other sources or settings; if the raw files are gone, it is taken as it is."""
    from pretrain.data.build.corpus import build_key
    from pretrain.data.sources.inputs import find_inputs

    try:
        inputs = [find_inputs(source) for source in corpus.sources]
    except UserError:
        return
    # `data build --on-bad skip` must not be refused by a config that says nothing of bad records.
    choices = [corpus.model_copy(update={"on_bad": on_bad}) for on_bad in ("error", "skip")]
    if key not in [build_key(choice, inputs) for choice in choices]:
        raise UserError(
            f"{corpus.path} was built from other sources or settings than this config's corpus section (or the raw "
            "files have changed); set another corpus.path, or leave out corpus.sources to train on it as it is"
        )
