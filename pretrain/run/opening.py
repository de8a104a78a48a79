"""Opening a run: its folder is made, or it is checked that the one there holds this run."""

from collections.abc import Collection

from pretrain.config.identity import changes, falsifying
from pretrain.config.load import to_yaml
from pretrain.config.run import RunConfig
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.run.folder import RunFolder
from pretrain.run.secrets import public


def open_run_folder(config: RunConfig, manifest: Manifest, allow_change: Collection[str] = ()) -> list[str]:
    """Make the run folder, or check that the one there holds this run; then write the config into it.

    Returns:
        Lines for the user: what is resumed, what has changed since.

    Raises:
        UserError: the folder holds another run, or the run was trained on another corpus.
    """
    run = RunFolder.of(config)
    lines, state = [], run.newest_state()
    if run.is_run:
        saved, now = run.public_config(), public(config)
        differences = changes(saved, now)
        another = falsifying(saved, now, tokens_seen=state.tokens_seen if state else 0)
        refused = [key for key in another if key not in allow_change]
        if refused:
            listed = "\n".join(f"  {key}: {differences[key][0]} there, {differences[key][1]} now" for key in refused)
            raise UserError(
                f"{run} holds another run:\n{listed}\nChoose another name (name=...), or, to go on with the changed "
                f"run all the same, add {' '.join(f'--allow-change {key}' for key in refused)}"
            )
        lines = [f"changed since: {key} {old} -> {new}" for key, (old, new) in differences.items()]
    elif run.path.is_dir() and any(run.path.iterdir()):
        raise UserError(f"{run} exists and is no run folder (it has no config.yaml); choose another name (name=...)")
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for leftover in run.path.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if state is not None:
        if state.fingerprint != manifest.fingerprint and "corpus" not in allow_change:
            raise UserError(
                f"{run} was trained on another corpus than {config.corpus.path} is now (its fingerprint differs); "
                "restore that corpus, choose another name (name=...), or start its data over with --allow-change corpus"
            )
        lines.insert(0, f"resuming {run} at step {state.step}")
    write_text(run.config_file, to_yaml(public(config)))
    return lines
