"""Context extension: how well the encoder predicts the same masked tokens from longer and longer windows.

Target blocks of the training length are drawn from documents long enough for the longest window. Around each block
lie nested windows, one per length, with the same masks; at every length exactly the masked tokens of the block are
scored. So a difference between two lengths is due to the context and nothing else, and the window of the training
length is the crop control of all longer ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pretrain.batch import IGNORED, Batch
from pretrain.config import RunConfig, load_config
from pretrain.data.counter_random import bits, permutation, uniform
from pretrain.data.loader import masking_rule
from pretrain.data.manifest import TOKEN_COUNTS, Manifest, load_manifest
from pretrain.data.masking import MaskingRule, mask_rows
from pretrain.data.shards import Shard
from pretrain.data.tokenizer import BOS, EOS
from pretrain.errors import UserError
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.training.checkpoint import (
    checkpoint_name,
    list_checkpoints,
    load_state,
    load_weights,
    newest_valid_checkpoint,
    verify_checkpoint,
)

MIN_DOCUMENTS = 4
"""Fewer documents than this say nothing about a length: it is skipped."""
_BLOCKS, _OFFSETS, _MASKS, _BOOTSTRAP = 6, 7, 8, 9
"""First parts of the keys of this file's random numbers."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LengthResult:
    """The same targets, predicted from windows of one length."""

    multiple: int
    """Of the training length."""
    length: int
    """Positions of the window."""
    loss: float
    """Nats per masked token."""
    loss_interval: tuple[float, float]
    """95 % by bootstrap over documents."""
    perplexity: float
    masked_accuracy: float
    gain: float
    """Loss from the window of the training length minus loss from this one: above zero, the context helps."""
    gain_interval: tuple[float, float]
    """95 % by bootstrap over documents."""


@dataclass(frozen=True)
class ContextReport:
    """What was measured, and on what."""

    run: str
    step: int
    tokens_seen: int
    training_length: int
    split: str
    fingerprint: str
    documents: int
    windows: int
    targets: int
    unigram_entropy: float
    """Of the training split's token frequencies, in nats."""
    unigram_loss: float
    """Nats per target when it is predicted from these frequencies alone."""
    results: list[LengthResult]
    skipped: dict[int, str]
    """Multiple -> why it could not be measured."""


@dataclass(frozen=True)
class _Window:
    document: int
    ids: Ids
    """int64 [longest], before masking."""
    key: int
    offset: int
    """Where the block begins in the longest window."""


def evaluate_run(
    run_folder: Path,
    step: int | None = None,
    overrides: Sequence[str] = (),
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> ContextReport:
    """Evaluate a checkpoint of a run: the newest valid one, or that of `step`.

    Args:
        run_folder: of the run.
        step: which checkpoint.
        overrides: KEY=VALUE of the section `evaluation`.
        report: called with (what, done, total).

    Raises:
        UserError: no such run, checkpoint or split, or no document that is long enough.
    """
    if not (run_folder / "config.yaml").is_file():
        raise UserError(f"{run_folder} is no run folder (it has no config.yaml); `diptych runs` lists them")
    config = load_config(str(run_folder / "config.yaml"), overrides)
    manifest = load_manifest(config.corpus.path)
    path = _find_checkpoint(run_folder, step)
    state = load_state(path)
    if state.fingerprint != manifest.fingerprint:
        raise UserError(f"{path} was trained on another corpus than {config.corpus.path} is now: its tokens may differ")
    model = MaskedLanguageModel(config.model, manifest.tokenizer.vocab_size)
    weights = load_weights(path)
    if config.model.tie_embeddings:
        weights["head.weight"] = weights["encoder.embedding.weight"]
    model.load_state_dict(weights)
    model.encoder.see_tokens(state.tokens_seen)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = _Scorer(model.to(device).eval(), device, config)

    length = config.data.sequence_length
    documents = _documents(config, manifest)
    multiples, skipped = _measurable(config, [len(document) for document in documents])
    windows = _draw_windows(documents, length, length * multiples[-1], config.evaluation.windows, config.seed)
    rule = masking_rule(config)
    per_length = []
    for done, multiple in enumerate(multiples):
        report(f"{multiple}x", done, len(multiples))
        per_length.append(scorer.score(windows, multiple, multiples[-1], rule))
    report("done", len(multiples), len(multiples))

    counts = np.load(config.corpus.path / TOKEN_COUNTS, allow_pickle=False).astype(np.float64)
    targets = np.concatenate([scores.targets for scores in per_length[0]])
    smoothed = (counts + 1) / (counts + 1).sum()
    return ContextReport(
        run=config.name,
        step=state.step,
        tokens_seen=state.tokens_seen,
        training_length=length,
        split=config.evaluation.split,
        fingerprint=manifest.fingerprint,
        documents=len({window.document for window in windows}),
        windows=len(windows),
        targets=len(targets),
        unigram_entropy=_entropy(counts),
        unigram_loss=float(-np.log(smoothed[targets]).mean()),
        results=_summarize(per_length, multiples, windows, length, config.seed),
        skipped=skipped,
    )


def _find_checkpoint(run_folder: Path, step: int | None) -> Path:
    checkpoints = run_folder / "checkpoints"
    available = ", ".join(str(int(p.name.removeprefix("step-"))) for p in list_checkpoints(checkpoints)) or "none"
    if step is None:
        path, warnings = newest_valid_checkpoint(checkpoints)
        if path is None:
            raise UserError(f"{run_folder} has no valid checkpoint; train first. {' '.join(warnings)}".strip())
        return path
    path = checkpoints / checkpoint_name(step)
    if path not in list_checkpoints(checkpoints):
        raise UserError(f"{run_folder} has no checkpoint of step {step}; there are: {available}")
    if problems := verify_checkpoint(path):
        raise UserError(f"{path} is damaged ({'; '.join(problems)}); there are: {available}")
    return path


def _documents(config: RunConfig, manifest: Manifest) -> list[Ids]:
    """The documents of the split that are longer than a row, with begin and end symbols."""
    documents = []
    for entry in manifest.splits[config.evaluation.split].shards:
        shard = Shard(config.corpus.path, entry, manifest.token_dtype)
        for sample in np.flatnonzero(shard.lengths + 2 >= config.data.sequence_length):
            ids = shard.tokens(int(sample), 0, int(shard.lengths[sample])).astype(np.int64)
            documents.append(np.concatenate(([BOS], ids, [EOS])))
    return documents


def _measurable(config: RunConfig, document_lengths: list[int]) -> tuple[list[int], dict[int, str]]:
    """The multiples that can be measured, ascending, and why the others cannot."""
    fits, skipped = [], {}
    for multiple in sorted({1, *config.evaluation.lengths}):
        length = multiple * config.data.sequence_length
        enough = sum(n >= length for n in document_lengths)
        if config.model.positions == "learned" and length > config.model.max_positions:
            skipped[multiple] = f"{length} positions are beyond the {config.model.max_positions} learned ones"
        elif enough < MIN_DOCUMENTS:
            skipped[multiple] = f"{enough} documents of the {config.evaluation.split} split have {length} tokens"
        else:
            fits.append(multiple)
    if not fits:
        raise UserError(f"the context evaluation cannot begin: {skipped[1]}, and it needs {MIN_DOCUMENTS}")
    return fits, skipped


def _draw_windows(documents: list[Ids], length: int, longest: int, count: int, seed: int) -> list[_Window]:
    """Target blocks at random among all there are, each at a random place in its longest window."""
    blocks = [
        (number, start)
        for number, ids in enumerate(documents)
        if len(ids) >= longest
        for start in range(0, len(ids) - length + 1, length)
    ]
    windows = []
    for key in permutation(len(blocks), seed, _BLOCKS)[:count].tolist():
        number, start = blocks[key]
        ids = documents[number]
        lowest, highest = max(0, start + length - longest), min(start, len(ids) - longest)
        begin = lowest + int(uniform(seed, _OFFSETS, key)[0] * (highest - lowest + 1))
        windows.append(_Window(number, ids[begin : begin + longest], key, start - begin))
    return windows


@dataclass(frozen=True)
class _Scores:
    """What one window's targets cost; [targets] each."""

    targets: Ids
    losses: npt.NDArray[np.float64]
    """In nats."""
    correct: npt.NDArray[np.bool_]


class _Scorer:
    """Losses of a model at the targets of windows."""

    def __init__(self, model: MaskedLanguageModel, device: torch.device, config: RunConfig) -> None:
        self._model, self._device, self._config = model, device, config

    @torch.inference_mode()
    def score(self, windows: list[_Window], multiple: int, longest_multiple: int, rule: MaskingRule) -> list[_Scores]:
        """Scores of each window's block, seen from windows of `multiple` blocks; the same targets at any multiple."""
        block = self._config.data.sequence_length
        length = multiple * block
        rows_at_once = max(1, self._config.evaluation.tokens_per_batch // length)
        scores: list[_Scores] = []
        for first in range(0, len(windows), rows_at_once):
            some = windows[first : first + rows_at_once]
            keys = bits(self._config.seed, _MASKS, np.array([w.key for w in some]))
            inputs, labels = mask_rows(np.stack([w.ids for w in some]), keys, rule)
            offsets = np.array([w.offset for w in some])
            # The nested window keeps the block's relative place: at 1x it is the block itself.
            share = (multiple - 1) / max(longest_multiple - 1, 1)
            starts = offsets - np.round(offsets * share).astype(np.int64)
            columns = starts[:, None] + np.arange(length)
            in_block = (columns >= offsets[:, None]) & (columns < offsets[:, None] + block)
            targets = np.where(in_block, np.take_along_axis(labels, columns, 1), IGNORED)
            batch = Batch(
                torch.from_numpy(np.take_along_axis(inputs, columns, 1)),
                torch.from_numpy(targets),
                torch.ones(columns.shape, dtype=torch.int64),
                torch.arange(length).expand(len(some), length),
            )
            layout = AttentionLayout.from_batch(batch).to(self._device)
            losses, correct = self._model(batch.to(self._device), layout)
            bounds = np.cumsum((targets != IGNORED).sum(axis=1))[:-1]
            pieces = (targets[targets != IGNORED], losses.double().cpu().numpy(), correct.cpu().numpy())
            scores.extend(_Scores(*window) for window in zip(*(np.split(p, bounds) for p in pieces), strict=True))
        return scores


def _entropy(counts: npt.NDArray[np.float64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _summarize(
    per_length: list[list[_Scores]],
    multiples: list[int],
    windows: list[_Window],
    length: int,
    seed: int,
) -> list[LengthResult]:
    """Means over targets, with intervals from 1,000 resamplings of the documents."""
    names, owner = np.unique([w.document for w in windows], return_inverse=True)
    num_targets = np.bincount(owner, [len(s.targets) for s in per_length[0]], minlength=len(names))
    generator = np.random.default_rng([seed, _BOOTSTRAP])
    draws = generator.integers(len(names), size=(1000, len(names)))

    def interval(sums: npt.NDArray[np.float64]) -> tuple[float, float]:
        means = sums[draws].sum(axis=1) / num_targets[draws].sum(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)

    def per_document(scores: list[_Scores]) -> npt.NDArray[np.float64]:
        return np.bincount(owner, [float(s.losses.sum()) for s in scores], minlength=len(names)).astype(np.float64)

    control = per_document(per_length[0])
    results = []
    for multiple, scores in zip(multiples, per_length, strict=True):
        sums = per_document(scores)
        loss = float(sums.sum() / num_targets.sum())
        results.append(
            LengthResult(
                multiple=multiple,
                length=multiple * length,
                loss=loss,
                loss_interval=interval(sums),
                perplexity=math.exp(loss),
                masked_accuracy=float(np.concatenate([s.correct for s in scores]).mean()),
                gain=float((control - sums).sum() / num_targets.sum()),
                gain_interval=interval(control - sums),
            )
        )
    return results
