"""What a rank needs to compute parts of a plan: the checkpoint's encoder, the windows, and what fits into memory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pretrain.batch import IGNORED, Batch
from pretrain.checkpoint.folder import load_state
from pretrain.checkpoint.format import MANIFEST_FILE
from pretrain.checkpoint.tensors import load_weights
from pretrain.config.run import RunConfig
from pretrain.data.manifest import TOKEN_COUNTS, Manifest, load_manifest
from pretrain.data.stream.loader import masking_rule
from pretrain.errors import UserError
from pretrain.evaluation.context.interventions import intervene
from pretrain.evaluation.context.plan import EvaluationPlan
from pretrain.evaluation.context.tasks import Vocabulary
from pretrain.evaluation.context.windows import TokenIds, Window, WindowRows, draw_windows, long_documents
from pretrain.evaluation.report.titles import Intervention
from pretrain.files import sha256_of
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.run.folder import RunFolder
from pretrain.run.secrets import with_secrets
from pretrain.training.zero.settings import resolve_precision

_T = TypeVar("_T")


class DoesNotFitError(Exception):
    """Raised where one row of a length does not fit into memory."""


def checkpoint_digest(path: Path) -> str:
    """Return a sha256 that covers every byte of a checkpoint."""
    return sha256_of(path / MANIFEST_FILE)


def config_of_run(run_folder: Path, corpus: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The saved config of a run, with another corpus of the same tokenizer if one is given.

    Raises:
        UserError: no run folder, no such corpus, or one of another tokenizer.
    """
    config = RunFolder(run_folder).public_config(overrides)
    if corpus is None or corpus.absolute() == config.corpus.path:
        return with_secrets(config)
    own, other = load_manifest(config.corpus.path), load_manifest(corpus.absolute())
    if own.tokenizer.sha256 != other.tokenizer.sha256:
        raise UserError(
            f"{corpus} is of another tokenizer ({other.tokenizer.kind}, {other.tokenizer.vocab_size:,} pieces) than "
            f"{config.name} was trained with ({own.tokenizer.kind}, {own.tokenizer.vocab_size:,} pieces): its ids mean "
            f"other tokens. Build it with corpus.tokenizer.model={config.corpus.path / 'tokenizer.model'}"
        )
    sections: dict[str, Any] = {"path": corpus.absolute(), "url": None, "sources": []}
    return config.model_copy(update={"corpus": config.corpus.model_copy(update=sections)})


def load_model(config: RunConfig, manifest: Manifest, checkpoint: Path, device: torch.device) -> MaskedLanguageModel:
    """The checkpoint's encoder and head in fp32, as it was at its number of tokens."""
    model = MaskedLanguageModel(config.model, manifest.tokenizer.vocab_size)
    weights = load_weights(checkpoint)
    if config.model.tie_embeddings:
        weights["head.weight"] = weights["encoder.embedding.weight"]
    model.load_state_dict(weights)
    model.encoder.set_tokens_seen(load_state(checkpoint).tokens_seen)
    return model.to(device).eval()


class Session:
    """A plan with everything that its parts are computed from."""

    def __init__(self, plan: EvaluationPlan, device: torch.device, documents: Sequence[TokenIds] | None = None) -> None:
        """`documents` are those of the plan's corpus, if they are at hand already."""
        self.plan, self.device = plan, device
        checkpoint = plan.checkpoint
        if checkpoint_digest(checkpoint) != plan.checkpoint_sha256:
            raise UserError(f"{checkpoint} has changed since the evaluation began; run the command again")
        config = config_of_run(plan.run_folder, plan.corpus, [f"evaluation.split={plan.split}"])
        self.config = config.in_phase(config.phase_at(load_state(checkpoint).tokens_seen))
        self.manifest = load_manifest(self.config.corpus.path)
        self.model = load_model(self.config, self.manifest, checkpoint, device)
        self.rule = masking_rule(self.config)
        self._documents = documents
        self.bf16 = device.type == "cuda" and resolve_precision(self.config) == "bf16"

    @cached_property
    def documents(self) -> Sequence[TokenIds]:
        """Documents of the plan's split that are at least a training row long."""
        return long_documents(self.config, self.manifest) if self._documents is None else self._documents

    @cached_property
    def windows(self) -> list[Window]:
        """The target blocks in their longest windows."""
        plan = self.plan
        return draw_windows(self.documents, plan.training_length, plan.longest, plan.windows, plan.seed)

    @cached_property
    def token_counts(self) -> npt.NDArray[np.int64]:
        """How often each id occurs in the training split; int64 [vocab_size]."""
        counts: npt.NDArray[np.int64] = np.load(self.config.corpus.path / TOKEN_COUNTS, allow_pickle=False)
        return counts

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What synthetic tasks are made of."""
        return Vocabulary.from_counts(self.token_counts, self.rule.is_special, self.plan.seed)

    def intervene(self, intervention: Intervention, length: int, factor: float) -> AbstractContextManager[None]:
        """Read rows of `length` so inside."""
        return intervene(self.model.encoder, intervention, length, self.plan.training_length, factor)

    def hidden(self, rows: WindowRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Final states at the targets of some rows, fp32 [targets, h], and their ids."""
        batch, layout = self._batch(rows)
        with self._autocast():
            states = self.model.encoder(batch.input_ids, layout)
        masked = batch.labels != IGNORED
        return states[masked].float(), batch.labels[masked]

    def score(self, rows: WindowRows) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Loss in nats and whether the most likely id is right, at every target of some rows."""
        batch, layout = self._batch(rows)
        with self._autocast():
            losses, correct = self.model(batch, layout)
        return losses.float().cpu().numpy(), correct.cpu().numpy()

    def encode(self, rows: WindowRows) -> None:
        """Put some rows through the encoder, for what hooks on its blocks see of them."""
        batch, layout = self._batch(rows)
        with self._autocast():
            self.model.encoder(batch.input_ids, layout)

    def _batch(self, rows: WindowRows) -> tuple[Batch, AttentionLayout]:
        shape = rows.inputs.shape
        batch = Batch(
            torch.from_numpy(rows.inputs),
            torch.from_numpy(rows.targets),
            torch.ones(shape, dtype=torch.int64),
            torch.arange(shape[1]).expand(shape),
        )
        layout = AttentionLayout.from_batch(batch).to(self.device)
        return batch.to(self.device), layout

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self.bf16 else nullcontext()

    def in_batches(self, rows: WindowRows, compute: Callable[[WindowRows], _T]) -> list[_T]:
        """`compute` on as many rows at once as the plan says; on fewer where these do not fit into memory.

        Raises:
            DoesNotFitError: one row does not fit.
        """
        length = rows.inputs.shape[1]
        size = max(1, self.plan.tokens_per_batch // length)
        results: list[_T] = []
        first = 0
        while first < len(rows.inputs):
            some = WindowRows(rows.inputs[first : first + size], rows.targets[first : first + size])
            try:
                results.append(compute(some))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if size == 1:
                    raise DoesNotFitError(f"a row of {length} does not fit into the memory of {self.device}") from error
                size = max(1, min(size, len(some.inputs)) // 2)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            first += len(some.inputs)
        return results


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in text or "allocate" in text
