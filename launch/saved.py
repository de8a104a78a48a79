"""`diptych checkpoint` and `diptych export-weights`: what a run has saved, whether it is whole, its plain weights."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text
from safetensors.torch import save_file

from launch.terminal.console import compact, duration, say
from launch.terminal.progress import StageProgress
from launch.terminal.tables import table
from pretrain.checkpoint.folder import (
    check_sizes,
    describe_damage,
    list_checkpoints,
    load_state,
    prunable,
    remove_checkpoint,
)
from pretrain.checkpoint.format import read_manifest, step_of
from pretrain.checkpoint.logits import EMBEDDING, compare_logits, load_logits, model_logits
from pretrain.checkpoint.tensors import SavedFragments, load_weights
from pretrain.checkpoint.verify import find_checkpoint, verify_checkpoint
from pretrain.errors import EXIT_DONE, EXIT_FAILED, UserError
from pretrain.files import atomic_path
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.run.folder import RunFolder

TIED = "head.weight"
"""What an encoder with tied embeddings does not have of its own."""


@dataclass(frozen=True)
class Export:
    """What `export_weights` did."""

    step: int
    tensors: int
    parameters: int
    bytes: int
    difference: float
    """The largest, between the logits stored at save time and those of the exported weights."""
    allowed: float
    precision: str
    tied: bool


def checkpoints_of(run: RunFolder) -> list[Path]:
    """The checkpoints of a run, oldest first.

    Raises:
        UserError: there are none.
    """
    found = list_checkpoints(run.checkpoints)
    if not found:
        raise UserError(f"{run} has no checkpoints yet; `diptych runs` says how far the run is")
    return found


def list_run(run: RunFolder, console: Console) -> None:
    """Print the checkpoints of a run, with what can be told without reading them."""
    rows: list[list[str | Text]] = []
    for path in checkpoints_of(run):
        problems = check_sizes(path)
        age = duration(max(0.0, time.time() - path.stat().st_mtime))
        files = [file.stat().st_size for file in path.iterdir() if file.is_file()]
        state = Text("; ".join(problems), style="red") if problems else Text("complete", style="green")
        rows.append([str(step_of(path)), f"{age} ago", str(len(files)), f"{compact(sum(files), ' ')}B", state])
    made = table(f"Checkpoints of {run.name}", ["step", "saved", "files", "size", "state"], rows, numbers_from=0)
    made.columns[-1].justify = "left"
    console.print(made)
    say(console, f"By name and size; `diptych checkpoint verify {run.name}` reads every byte.")


def show_checkpoint(run: RunFolder, step: int | None, console: Console) -> None:
    """Print what a valid checkpoint holds: its files, and where the run stood."""
    path = find_checkpoint(run.checkpoints, step)
    manifest, state, index = read_manifest(path), load_state(path), SavedFragments(path).index
    rows = []
    for name, entry in sorted(manifest.files.items()):
        pieces = index.fragments.get(name)
        rows.append([name, f"{entry.bytes:,}", entry.sha256[:16], "-" if pieces is None else f"{len(pieces):,}"])
    total = sum(entry.bytes for entry in manifest.files.values())
    parameters = sum(index.numel.values())
    skipped = state.step - state.optimizer_steps
    facts = Text(
        f"tokens seen: {state.tokens_seen:,}, in {state.stream.position:,} rows\n"
        f"optimizer steps: {state.optimizer_steps:,}"
        + (f"; skipped: {skipped:,}\n" if skipped else "\n")
        + f"parameters: {parameters:,}; values of each: {', '.join(sorted({kind for kind, _ in index.ranges()}))}\n"
        f"written by {len(index.fragments)} rank(s); {total:,} bytes, {total / parameters:.2f} a parameter\n"
        f"corpus: {state.fingerprint[:12]}\n"
    )
    made = table(f"Step {state.step} of {run.name}", ["file", "bytes", "sha256", "fragments"], rows)
    console.print(Group(made, facts, Text(str(path))))


def verify_run(run: RunFolder, step: int | None, console: Console) -> int:
    """Read every byte of a run's checkpoints, or of one; returns the exit code, 1 if something is damaged."""
    paths = checkpoints_of(run)
    if step is not None:
        paths = [path for path in paths if step_of(path) == step]
        if not paths:
            raise UserError(f"{run} has no checkpoint of step {step}; `diptych checkpoint list` shows them")
    damaged = 0
    for path, problems in _verified(paths, console).items():
        damaged += bool(problems)
        if problems:
            say(console, describe_damage(path, problems), "red")
        else:
            say(console, f"step {step_of(path)} is whole: {len(read_manifest(path).files) + 1} files")
    return EXIT_FAILED if damaged else EXIT_DONE


def _verified(paths: list[Path], console: Console) -> dict[Path, list[str]]:
    found = {}
    with StageProgress(console) as progress:
        for done, path in enumerate(paths):
            progress.report("verifying", done, len(paths))
            found[path] = verify_checkpoint(path)
        progress.report("verifying", len(paths), len(paths))
    return found


def prune_run(run: RunFolder, keep_last: int | None, keep_every: int | None, dry_run: bool, console: Console) -> None:
    """Remove old checkpoints, after reading all: only valid ones count as kept, and damaged ones stay.

    What is not given is as in the run's config.
    """
    config = run.public_config().checkpoint
    keep_last = config.keep_last if keep_last is None else keep_last
    keep_every = config.keep_every if keep_every is None else keep_every
    found = _verified(checkpoints_of(run), console)
    for path, problems in found.items():
        if problems:
            say(console, f"{describe_damage(path, problems)}; it is neither counted nor removed", "yellow")
    valid = [path for path, problems in found.items() if not problems]
    removed = prunable(valid, keep_last, keep_every)
    freed = sum(file.stat().st_size for path in removed for file in path.iterdir())
    for path in removed:
        say(console, f"{'would remove' if dry_run else 'removed'} step {step_of(path)}")
        if not dry_run:
            remove_checkpoint(path)
    kept = ", ".join(str(step_of(path)) for path in valid if path not in removed) or "none"
    say(console, f"{len(removed)} {'to remove' if dry_run else 'removed'}, {compact(freed, ' ')}B; kept: step {kept}")


def export_weights(run: RunFolder, step: int | None, out: Path) -> Export:
    """Write the whole fp32 weights of a checkpoint as a plain safetensors file.

    The encoder is built anew from the run's config and these weights, and put to the tokens whose logits were stored
    when the checkpoint was saved.

    Raises:
        UserError: there is no such valid checkpoint, or the logits differ by more than rounding explains.
    """
    path = find_checkpoint(run.checkpoints, step)
    config, state, weights = run.public_config(), load_state(path), load_weights(path)
    tied = config.model.tie_embeddings
    model = MaskedLanguageModel(config.model, len(weights[EMBEDDING]))
    model.load_state_dict(weights | ({TIED: weights[EMBEDDING]} if tied else {}))
    saved = load_logits(path)
    difference, allowed = compare_logits(saved, model_logits(model, saved))
    if difference > allowed:
        raise UserError(
            f"the weights of {path} do not give the logits that were stored with them: the largest difference is "
            f"{difference:.3g}, and {allowed:.3g} is allowed. Nothing is written. Is {run.config_file} "
            "still the run's own?"
        )
    metadata = {
        "format": "pt",
        "run": config.name,
        "step": str(state.step),
        "tokens_seen": str(state.tokens_seen),
        "model": config.model.model_dump_json(),
    }
    try:
        with atomic_path(out) as temporary:
            save_file(weights, temporary, metadata)
            size = temporary.stat().st_size
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}); choose another --out FILE") from error
    parameters = sum(weight.numel() for weight in weights.values())
    return Export(state.step, len(weights), parameters, size, difference, allowed, saved.precision, tied)


def export_run(run: RunFolder, step: int | None, out: Path, console: Console) -> None:
    """`export_weights`, and what it did."""
    done = export_weights(run, step, out)
    say(
        console,
        f"step {done.step} of {run.name}: {done.tensors} tensors, {done.parameters:,} parameters in fp32, "
        f"{compact(done.bytes, ' ')}B",
    )
    if done.tied:
        say(console, f"{TIED} is not among them: it is {EMBEDDING} (model.tie_embeddings)")
    say(
        console,
        f"largest difference to the logits stored at save time ({done.precision}): {done.difference:.3g} "
        f"(allowed: {done.allowed:.3g})",
    )
    say(console, f"weights: {out.absolute()}")
