"""The numbers of a `ContextReport`, from a finished plan; the same whoever computed its parts."""

import shlex
import time
from collections.abc import Sequence

import numpy as np
import torch

from pretrain import __version__
from pretrain.checkpoint.folder import load_state
from pretrain.config.model import ModelConfig
from pretrain.evaluation.context.results.curves import (
    ablation_results,
    context_need,
    intervention_results,
    length_results,
    profiles,
)
from pretrain.evaluation.context.results.evaluation import Evaluation
from pretrain.evaluation.context.results.probes import attention_results, pseudo_results, speed_results, task_results
from pretrain.evaluation.context.results.statistics import entropy_of_counts
from pretrain.evaluation.context.results.verdict import (
    cautions,
    effective_multiple,
    headline,
    held_multiple,
    used_multiple,
)
from pretrain.evaluation.context.session import Session
from pretrain.evaluation.report.schema import ContextReport, Provenance
from pretrain.run.folder import RunFolder

_SETTINGS = (
    "windows",
    "reading_windows",
    "task_samples",
    "attention_windows",
    "pseudo_targets",
    "context_threshold",
    "tokens_per_batch",
)


def build_report(evaluation: Evaluation, ranks: int, command: Sequence[str]) -> ContextReport:
    """Return the report; `ranks` and `command` are told in it."""
    session, plan, config = evaluation.session, evaluation.plan, evaluation.session.config
    results = length_results(evaluation)
    counts = session.token_counts.astype(np.float64)
    smoothed = (counts + 1) / (counts + 1).sum()
    unigram_loss = float(-np.log(smoothed[evaluation.targets]).mean())
    documents, effective = evaluation.bootstrap.num_documents, effective_multiple(results)
    interventions = intervention_results(evaluation)
    return ContextReport(
        headline=" ".join([headline(results), *cautions(results, documents, unigram_loss)]),
        run=config.name,
        step=plan.step,
        tokens_seen=load_state(plan.checkpoint).tokens_seen,
        training_length=plan.training_length,
        split=plan.split,
        corpus=config.corpus.path.name,
        documents=documents,
        windows=len(session.windows),
        targets=len(evaluation.targets),
        reading_windows=min(plan.reading_windows, len(session.windows)),
        unigram_entropy=entropy_of_counts(counts),
        unigram_loss=unigram_loss,
        effective_multiple=effective,
        effective_length=plan.length(effective),
        used_multiple=used_multiple(results),
        held_multiple=held_multiple(results),
        results=results,
        skipped=evaluation.skipped,
        context_need=context_need(evaluation),
        profiles=profiles(evaluation),
        readings=interventions,
        ablations=ablation_results(evaluation),
        tasks=task_results(evaluation),
        attention=attention_results(evaluation),
        pseudo=pseudo_results(evaluation),
        speed=speed_results(evaluation),
        recalibrations=[],
        budget=plan.budget,
        settings={key: getattr(plan, key) for key in _SETTINGS},
        model=_model_in_words(config.model),
        provenance=_provenance(session, ranks, command),
    )


def _provenance(session: Session, ranks: int, command: Sequence[str]) -> Provenance:
    plan = session.plan
    return Provenance(
        command=shlex.join(command),
        diptych=__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu",
        ranks=ranks,
        seed=plan.seed,
        config=str(RunFolder(plan.run_folder).config_file),
        corpus=str(plan.corpus),
        fingerprint=plan.fingerprint,
        tokenizer_sha256=session.manifest.tokenizer.sha256,
        checkpoint_sha256=plan.checkpoint_sha256,
        written=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    )


def _model_in_words(model: ModelConfig) -> dict[str, str]:
    spans = ["global" if layer.window is None else f"{layer.window}" for layer in model.resolved_layers]
    positions: list[str] = [layer.positions or "none" for layer in model.resolved_layers]
    if model.positions == "learned":
        positions = ["learned"]
    return {
        "attention": model.attention.replace("_", "-"),
        "layers": f"{model.num_layers} of width {model.hidden_size}",
        "spans": ", ".join(dict.fromkeys(spans)),
        "positions": ", ".join(dict.fromkeys(positions)),
    }
