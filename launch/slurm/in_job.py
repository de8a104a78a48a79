"""Runs that a job of the user's own script trains (slurm/*.sbatch): prepared inside the job, for what Slurm gave it.

A job does here at its first start what `diptych submit` does on a login node; submitit is not needed. Later starts of
the job find what the first one prepared.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from launch.preparation import find_manifest
from launch.slurm.queueing import prepare
from launch.slurm.refusals import refuse_if_queued
from launch.slurm.submission import submissions_of
from launch.terminal.console import say
from pretrain.config.run import RunConfig
from pretrain.config.topology import check_cluster_ranks
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.opening import is_trained
from pretrain.training.monitor.profiled_steps import ProfiledSteps


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """The job at hand: 123, or 123_4 for a member of an array.

    Raises:
        UserError: this is no job.
    """
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("--in-job is for the script of a Slurm job, and this is none: sbatch slurm/train.sbatch CONFIG")
    task = environment.get("SLURM_ARRAY_TASK_ID")
    return job if task is None else f"{job}_{task}"


def allocation_overrides(environment: Mapping[str, str] = os.environ) -> list[str]:
    """KEY=VALUE changes that make the section `cluster` say what the job at hand was given.

    Raises:
        UserError: this is no job.
    """
    job_id(environment)
    given = {
        "nodes": environment.get("SLURM_JOB_NUM_NODES", "1"),
        "min_nodes": "null",
        "gpus_per_node": environment.get("SLURM_GPUS_ON_NODE", "0"),
        "tasks_per_node": environment.get("SLURM_NTASKS_PER_NODE", "null"),
        "cpus_per_task": environment.get("SLURM_CPUS_PER_TASK", "null"),
    }
    return [f"cluster.{key}={value}" for key, value in given.items()]


def prepare_run(
    config: RunConfig,
    console: Console,
    allow_change: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
    profile: ProfiledSteps | None = None,
) -> Path | None:
    """The submission's folder for the job at hand, made at its first start; None if the run is trained already.

    Raises:
        UserError: the run would fail, or another job is at work on it.
    """
    job, run = job_id(environment), RunFolder.of(config)
    if int(environment.get("SLURM_RESTART_COUNT", "0")):
        for folder, submission in submissions_of(run):
            if submission.jobs.get("train") == job:
                return folder
    check_cluster_ranks(config)
    refuse_if_queued(run)
    manifest = find_manifest(config)
    if is_trained(config):
        say(console, f"{run} is trained to its {config.training.tokens:,} tokens already")
        return None
    folder, submission = prepare(config, manifest, console, allow_change, profile)
    submission.jobs["train"] = job
    submission.write(folder)
    return folder
