"""One training on this machine from end to end: corpus, run folder, ranks, context report."""

from collections.abc import Sequence

from rich.console import Console

from launch.evaluate import evaluate_context
from launch.local.display import make_display
from launch.local.ranks import num_gpus
from launch.local.training import launch_local
from launch.preparation import ensure_corpus, profile_variables
from launch.slurm.refusals import refuse_if_queued
from launch.terminal.console import say
from pretrain.config.run import RunConfig
from pretrain.config.topology import check_topology
from pretrain.errors import EXIT_DONE, UserError
from pretrain.evaluation.context.request import Request
from pretrain.run.folder import RunFolder
from pretrain.run.lock import run_lock
from pretrain.run.opening import is_trained, open_run_folder
from pretrain.run.secrets import remember_secrets
from pretrain.training.monitor.profiled_steps import ProfiledSteps


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


def train_and_evaluate(
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
    remember_secrets(config)
    run = RunFolder.of(config)
    refuse_if_queued(run)
    manifest = ensure_corpus(config.corpus, console)
    with run_lock(run):
        variables = profile_variables(profile, config, manifest, console)
        for line in open_run_folder(config, manifest, allow_change):
            say(console, line)
        if is_trained(config):
            say(console, f"{run} is trained to its {config.training.tokens:,} tokens already")
        else:
            where = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
            say(console, f"training {config.name} on {where} in {run}")
            exit_code = launch_local(config, num_ranks, make_display(console), variables)
            if exit_code != EXIT_DONE:
                return exit_code
        if evaluate:
            try:
                evaluate_context(Request(run.path), console, num_ranks=num_ranks if num_gpus() else 1)
            except UserError as error:
                raise UserError(f"{config.name} is trained, but could not be evaluated: {error}") from error
    return EXIT_DONE
