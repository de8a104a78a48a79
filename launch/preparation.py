"""What must be there before a run trains, here or on Slurm: its corpus, steps left to take, steps to profile."""

from rich.console import Console

from launch.terminal.console import make_console, say
from launch.terminal.progress import StageProgress
from pretrain.config.data import CorpusConfig
from pretrain.config.run import RunConfig
from pretrain.data.manifest import MANIFEST, Manifest, load_manifest
from pretrain.data.tokenizer import RESIDUES, SPECIAL_PIECES
from pretrain.errors import UserError
from pretrain.redaction import redact
from pretrain.run.folder import RunFolder
from pretrain.run.secrets import is_without_secret
from pretrain.training.monitor.profiled_steps import VARIABLE, ProfiledSteps, check_steps


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
    hidden = next((source.path for source in corpus.sources if is_without_secret(source.path)), None)
    if corpus.sources and not (corpus.path / MANIFEST).is_file():
        if hidden is not None:
            raise UserError(
                f"there is no finished corpus at {corpus.path}, and the run's config.yaml has its source {hidden} "
                "without its password or token; build the corpus with `diptych data build CONFIG`, from the config "
                "that the run was started with"
            )
        say(console, f"there is no finished corpus at {corpus.path} yet: building it")
        return build(corpus, console)
    manifest = load_manifest(corpus.path)
    if corpus.sources and manifest.build_key is not None and hidden is None:
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


def find_manifest(config: RunConfig) -> Manifest:
    """The corpus's manifest, which must be there before a job is queued.

    Raises:
        UserError: there is no corpus.
    """
    if not config.corpus.url and not (config.corpus.path / MANIFEST).is_file():
        raise UserError(
            f"there is no corpus at {config.corpus.path}; build it first, with `diptych data build CONFIG`, here or "
            "in a job without GPUs: no GPU should wait for it"
        )
    return ensure_corpus(config.corpus, make_console()) if config.corpus.url else load_manifest(config.corpus.path)


def vocabulary_of(config: RunConfig) -> tuple[int, str]:
    """The number of pieces, and where it is known from: the corpus, if it is built, or else the config."""
    if (config.corpus.path / MANIFEST).is_file():
        return load_manifest(config.corpus.path).tokenizer.vocab_size, f"of the corpus {config.corpus.path}"
    if config.corpus.tokenizer.kind == "protein":
        return len(SPECIAL_PIECES) + len(RESIDUES), "of the protein alphabet"
    return config.corpus.tokenizer.vocab_size, "by corpus.tokenizer.vocab_size (the corpus is not built)"


def profile_variables(
    steps: ProfiledSteps | None, config: RunConfig, manifest: Manifest, console: Console
) -> dict[str, str]:
    """Environment variables by which the ranks record these steps; none if there is nothing to record.

    Raises:
        UserError: the run does not come to these steps.
    """
    if steps is None:
        return {}
    run = RunFolder.of(config)
    state = run.newest_state()
    if not check_steps(steps, config, manifest.splits["train"], state.step if state else 0):
        say(console, f"steps {steps} are recorded in {run.profile} already")
        return {}
    return {VARIABLE: str(steps)}
