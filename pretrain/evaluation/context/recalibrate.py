"""A short training on long rows, from a checkpoint on: what some more tokens make of an encoder that reads long rows.

It is a run of its own inside the evaluation's folder, made by the trainer as any other: the original run with one more
phase. It begins with the checkpoint's weights, moments and place in the stream, and its learning rate falls over it.
"""

from pretrain.checkpoint.folder import load_state
from pretrain.config.parallel import ParallelConfig
from pretrain.config.run import PhaseConfig, RunConfig
from pretrain.config.training import ScheduleConfig
from pretrain.errors import UserError
from pretrain.evaluation.context.plan import EvaluationPlan
from pretrain.run.folder import RunFolder


def recalibration_config(plan: EvaluationPlan, tokens: int, num_ranks: int) -> RunConfig:
    """The run that goes on from a plan's checkpoint for `tokens` more, with rows of the longest measured length.

    The batch keeps its number of tokens, as far as the ranks allow. The learning rate falls linearly from the peak over
    the recalibration.

    Raises:
        UserError: learned positions do not reach so far.
    """
    multiple, run = plan.multiples[-1], RunFolder(plan.run_folder)
    config = run.config()
    seen = load_state(plan.checkpoint).tokens_seen
    now, length = config.in_phase(config.phase_at(seen)), plan.length(multiple)
    if config.model.positions == "learned" and length > config.model.max_positions:
        raise UserError(
            f"--recalibrate at {length} tokens is beyond the {config.model.max_positions} learned positions"
        )
    factor = max(1, round(multiple))
    rows = max(1, now.training.batch_size // factor // num_ranks) * num_ranks
    phase = PhaseConfig(
        from_tokens=seen,
        sequence_length=length,
        batch_size=rows,
        micro_batch_size=max(1, now.training.micro_batch_size // factor),
    )
    total = seen + tokens
    sharding = "full" if config.training.sharding == "hybrid" else config.training.sharding
    return config.model_copy(
        update={
            "name": f"recalibrated-{multiple:g}x-{tokens}-from-{plan.step}",
            "runs": run.evaluation,
            "phases": [*(p for p in config.phases if p.from_tokens < seen), phase],
            "training": config.training.model_copy(update={"tokens": total, "sharding": sharding}),
            "parallel": ParallelConfig(),
            "schedule": ScheduleConfig(warmup=0, decay=tokens / total, final=config.schedule.final),
        }
    )


def recalibrated_plan(plan: EvaluationPlan, config: RunConfig, step: int, checkpoint_sha256: str) -> EvaluationPlan:
    """Return a plan of the same windows, scored by the recalibrated encoder."""
    changes = {"run_folder": config.run_folder, "step": step, "checkpoint_sha256": checkpoint_sha256}
    only_curve = {"interventions": [], "ablations": [], "tasks": [], "attention_windows": 0, "pseudo_targets": 0}
    return plan.model_copy(update={**changes, **only_curve})
