"""Opening a run: its folder is made, or it is checked that the one there holds this run."""

from collections.abc import Collection

from pretrain.checkpoint.format import TrainingState
from pretrain.config.identity import changes, falsifying
from pretrain.config.load import to_yaml
from pretrain.config.run import RunConfig
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.run.folder import RunFolder
from pretrain.run.secrets import public


def open_run_folder(config: RunConfig, manifest: Manifest, allow_change: Collection[str] = ()) -> list[str]:
    """Make the run folder with its config, or check that the one there holds this run.

    Where the config is another than that of the run, it is the next start's, and becomes the run's with the first step
    that is trained under it. A run that has not trained yet takes any config. A run that
    is trained to its end keeps its own; only where it and its corpus lie, and how it is evaluated, is as given.

    Returns:
        Lines for the user: what is resumed, what has changed since.

    Raises:
        UserError: the folder holds another run, or the run was trained on another corpus, or on more tokens.
    """
    run = RunFolder.of(config)
    state = run.newest_state()
    if not run.is_run and run.path.is_dir() and any(run.path.iterdir()):
        raise UserError(f"{run} exists and is no run folder (it has no config.yaml); choose another name (name=...)")
    begun = run.is_run and (state is not None or bool(run.metrics()))
    lines = _changed_since(run, config, state, allow_change) if begun else []
    if state is not None:
        if state.fingerprint != manifest.fingerprint and "corpus" not in allow_change:
            raise UserError(
                f"{run} was trained on another corpus than {config.corpus.path} is now (its fingerprint differs); "
                "restore that corpus, choose another name (name=...), or start its data over with --allow-change corpus"
            )
        lines.insert(0, f"resuming {run} at step {state.step}")
    done = is_trained(config)
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for leftover in run.path.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if not begun:
        run.write_config(config)
    elif done and state is not None:
        is_same = state.fingerprint == manifest.fingerprint
        given = {"runs": config.runs, "name": config.name, "evaluation": config.evaluation}
        given |= {"corpus": config.corpus} if is_same else {}
        run.write_config(run.public_config().model_copy(update=given))
    elif changes(run.public_config(), public(config)):
        write_text(run.pending_config, to_yaml(public(config)))
    else:
        run.pending_config.unlink(missing_ok=True)
    return lines


def is_trained(config: RunConfig) -> bool:
    """Whether the run is trained to its last token already, so that a start has nothing to do.

    Raises:
        UserError: it is trained on more tokens than that, by more than the step that reached them.
    """
    run, tokens = RunFolder.of(config), config.training.tokens
    state = run.newest_state()
    if state is not None and tokens < state.tokens_seen:
        steps = [record["tokens"] for record in run.metrics() if "loss" in record and record["step"] < state.step]
        if steps and tokens <= steps[-1]:
            raise UserError(
                f"{run} is trained on {state.tokens_seen:,} tokens already, but training.tokens is {tokens:,}: raise "
                "it above that to train further, leave the override out to keep the run as it is, or choose another "
                "name (name=...) to train on fewer"
            )
    return run.has_ended(tokens)


def _changed_since(
    run: RunFolder, config: RunConfig, state: TrainingState | None, allow_change: Collection[str]
) -> list[str]:
    """A line for each setting that is another than that of the run; refuses those that make it another run."""
    saved, now = run.public_config(), public(config)
    differences = changes(saved, now)
    another = falsifying(saved, now, tokens_seen=state.tokens_seen if state else 0)
    if refused := [key for key in another if key not in allow_change]:
        listed = "\n".join(f"  {key}: {differences[key][0]} there, {differences[key][1]} now" for key in refused)
        raise UserError(
            f"{run} holds another run:\n{listed}\nChoose another name (name=...), or, to go on with the changed "
            f"run all the same, add {' '.join(f'--allow-change {key}' for key in refused)}"
        )
    return [f"changed since: {key} {old} -> {new}" for key, (old, new) in differences.items()]
