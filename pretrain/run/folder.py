"""The run folder: which run it holds, and the files in it that say how the run is doing.

runs/NAME/  config.yaml  environment.json  metrics.jsonl  status.json
            attempts/  checkpoints/  evaluation/  logs/  tensorboard/
"""

import os
from collections.abc import Collection

from pretrain.checkpoint.folder import newest_state
from pretrain.config.identity import changes, falsifying
from pretrain.config.load import load_config, to_yaml
from pretrain.config.run import RunConfig
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.redaction import HIDDEN, redact

CONFIG = "config.yaml"


CORPUS_URL = "DIPTYCH_CORPUS_URL"
"""The environment variable by which ranks get a `corpus.url` that holds a password or token: config.yaml does not."""


def public(config: RunConfig) -> RunConfig:
    """The config as it may be written: no passwords and tokens in its URLs."""
    corpus = config.corpus
    sources = [source.model_copy(update={"path": redact(source.path)}) for source in corpus.sources]
    update = {"url": corpus.url and redact(corpus.url), "sources": sources}
    return config.model_copy(update={"corpus": corpus.model_copy(update=update)})


def with_secrets(config: RunConfig) -> RunConfig:
    """A config that was read from a run folder, with the URL that was left out there.

    Raises:
        UserError: it is not in the environment.
    """
    url = config.corpus.url
    if url is None or HIDDEN not in url:
        return config
    whole = os.environ.get(CORPUS_URL)
    if whole is None or redact(whole) != url:
        raise UserError(
            f"config.yaml holds corpus.url without its password or token ({url}); set {CORPUS_URL} to the whole URL"
        )
    return config.model_copy(update={"corpus": config.corpus.model_copy(update={"url": whole})})


def open_run_folder(config: RunConfig, manifest: Manifest, allow_change: Collection[str] = ()) -> list[str]:
    """Make the run folder, or check that the one there holds this run; then write the config into it.

    Returns:
        Lines for the user: what is resumed, what has changed since.

    Raises:
        UserError: the folder holds another run, or the run was trained on another corpus.
    """
    folder = config.run_folder
    saved_config = folder / CONFIG
    lines = []
    state = newest_state(folder / "checkpoints")
    if saved_config.is_file():
        saved, now = load_config(str(saved_config)), public(config)
        differences = changes(saved, now)
        another = falsifying(saved, now, tokens_seen=state.tokens_seen if state else 0)
        refused = [key for key in another if key not in allow_change]
        if refused:
            listed = "\n".join(f"  {key}: {differences[key][0]} there, {differences[key][1]} now" for key in refused)
            raise UserError(
                f"{folder} holds another run:\n{listed}\nChoose another name (name=...), or, to go on with the changed "
                f"run all the same, add {' '.join(f'--allow-change {key}' for key in refused)}"
            )
        lines = [f"changed since: {key} {old} -> {new}" for key, (old, new) in differences.items()]
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no run folder (it has no {CONFIG}); choose another name (name=...)")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if state is not None:
        if state.fingerprint != manifest.fingerprint and "corpus" not in allow_change:
            raise UserError(
                f"{folder} was trained on another corpus than {config.corpus.path} is now (its fingerprint differs); "
                "restore that corpus, choose another name (name=...), or start its data over with --allow-change corpus"
            )
        lines.insert(0, f"resuming {folder} at step {state.step}")
    write_text(saved_config, to_yaml(public(config)))
    return lines
