"""One training from end to end: corpus, run folder, ranks, context report. What `train` and `quickstart` share."""

from collections.abc import Sequence

from rich.console import Console

from launch.display import StageProgress, make_display, say
from launch.evaluate import evaluate_context
from launch.local import launch_local, num_gpus
from pretrain.config import CorpusConfig, RunConfig, check_topology
from pretrain.data.manifest import MANIFEST, Manifest, load_manifest
from pretrain.errors import EXIT_DONE, UserError
from pretrain.redaction import redact
from pretrain.status import read_status
from pretrain.training.profiled_steps import FOLDER, VARIABLE, ProfiledSteps, check_steps


def choose_num_ranks(config: RunConfig, nproc: int | None) -> int:
    """`nproc`, or else one rank per local GPU, or else one.

    Raises:
        UserError: more ranks than GPUs, or a number that streams and batch cannot be divided by.
    """
    gpus = num_gpus()
    if nproc is not None and gpus and nproc > gpus:
        raise UserError(
            f"--nproc {nproc}, but this machine has {gpus} GPUs for one rank each; use at most {gpus}, or set "
            "DS_ACCELERATOR=cpu to train on its processors"
        )
    num_ranks = nproc or gpus or 1
    check_topology(config, num_ranks)
    return num_ranks


def build(corpus: CorpusConfig, console: Console, part: int | None = None, parts: int | None = None) -> Manifest:
    """Build the corpus, with progress; one of its `parts`, or, where it is not said which, join them."""
    from pretrain.data.corpus import build_corpus
    from pretrain.data.parts import build_part, join_parts

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
        from pretrain.data.remote import fetch_description

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
    from pretrain.data.corpus import build_key
    from pretrain.data.readers import find_inputs

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


def train(
    config: RunConfig,
    num_ranks: int,
    console: Console,
    *,
    allow_change: Sequence[str] = (),
    evaluate: bool = True,
    profile: ProfiledSteps | None = None,
) -> int:
    """Train to the end, or go on where an earlier attempt ended, then write the context report.

    The steps of `profile` are recorded.

    Returns:
        The exit code; see `launch_local`.
    """
    from launch.submit import refuse_if_queued

    refuse_if_queued(config.run_folder)
    manifest = ensure_corpus(config.corpus, console)
    from pretrain.training.run_folder import open_run_folder
    from pretrain.training.run_lock import run_lock

    with run_lock(config.run_folder):
        variables = profiling(profile, config, manifest, console)
        for line in open_run_folder(config, manifest, allow_change):
            say(console, line)
        if is_complete(config):
            say(console, f"{config.run_folder} is trained to its {config.training.tokens:,} tokens already")
        else:
            where = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
            say(console, f"training {config.name} on {where} in {config.run_folder}")
            exit_code = launch_local(config, num_ranks, make_display(console), variables)
            if exit_code != EXIT_DONE:
                return exit_code
        if evaluate:
            try:
                evaluate_context(config.run_folder, console, num_ranks=num_ranks if num_gpus() else 1)
            except UserError as error:
                raise UserError(f"{config.name} is trained, but could not be evaluated: {error}") from error
    return EXIT_DONE


def profiling(steps: ProfiledSteps | None, config: RunConfig, manifest: Manifest, console: Console) -> dict[str, str]:
    """Environment variables by which the ranks record these steps; none if there is nothing to record.

    Raises:
        UserError: the run does not come to these steps.
    """
    if steps is None:
        return {}
    from pretrain.training.checkpoint import newest_state

    state = newest_state(config.run_folder / "checkpoints")
    if not check_steps(steps, config, manifest.splits["train"], state.step if state else 0):
        say(console, f"steps {steps} are recorded in {config.run_folder / FOLDER} already")
        return {}
    return {VARIABLE: str(steps)}


def is_complete(config: RunConfig) -> bool:
    """Whether the run has seen all its tokens, and its last checkpoint is still there."""
    status = read_status(config.run_folder)
    if status is None or status.state != "done" or status.checkpoint is None:
        return False
    here = (config.run_folder / "checkpoints" / status.checkpoint).is_dir()
    return here and status.tokens >= config.training.tokens
