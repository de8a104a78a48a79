"""What each setting means to the engine and to the plan alike, and what DeepSpeed is told of it."""

import pytest

from pretrain.config.load import load_config
from pretrain.config.run import RunConfig
from pretrain.training.cost.activations import ForwardPass
from pretrain.training.cost.hardware import GIB, Hardware
from pretrain.training.cost.memory import Spread
from pretrain.training.cost.need import forward_pass
from pretrain.training.zero.settings import (
    accumulation_steps,
    arithmetic,
    checkpoint_every,
    compiles,
    deepspeed_config,
    overlaps,
    resolve_precision,
    rows_per_rank,
)


def run(**training: str | int) -> RunConfig:
    overrides = [f"training.{key}={value}" for key, value in {"batch_size": 64, **training}.items()]
    return load_config("model/1m", overrides, beneath={"corpus": {"path": "corpora/none"}})


def planned(config: RunConfig, on_gpu: bool = False) -> ForwardPass:
    return forward_pass(config, 512, Hardware("x", 64 * GIB, 4, on_gpu, 4))


@pytest.mark.parametrize(("setting", "every"), [("none", 0), ("full", 1), (3, 3)])
def test_activation_checkpointing_is_none_all_or_every_kth_block(setting, every):
    config = run(activation_checkpointing=setting)
    assert checkpoint_every(config) == planned(config).checkpoint_every == every


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_gpu"), [("auto", False, True), ("on", True, True), ("off", False, False)]
)
def test_blocks_are_compiled_on_a_gpu_unless_told_otherwise(setting, on_cpu, on_gpu):
    config = run(compile=setting)
    assert (compiles(config, on_gpu=False), compiles(config, on_gpu=True)) == (on_cpu, on_gpu)
    assert (planned(config).compiled, planned(config, on_gpu=True).compiled) == (on_cpu, on_gpu)


def test_precision_is_what_the_device_multiplies_natively_unless_told_otherwise():
    assert [resolve_precision(run(precision="auto"), native) for native in (True, False)] == ["bf16", "fp32"]
    assert [resolve_precision(run(precision=p), p == "fp32") for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert planned(run(precision="auto"), on_gpu=True).compute_bytes == 2


@pytest.mark.parametrize(
    ("precision", "sharding", "expected", "compute_bytes", "weight_bytes"),
    [
        ("fp32", "none", "fp32", 4, 4),
        ("fp32", "full", "fp32", 4, 4),
        ("bf16", "none", "autocast", 2, 4),
        ("bf16", "optimizer", "bf16", 2, 2),
    ],
)
def test_bf16_without_sharding_is_autocast_over_weights_in_fp32(
    precision, sharding, expected, compute_bytes, weight_bytes
):
    config = run(precision=precision, sharding=sharding)
    spread, forward = Spread.of(config, 4, precision), planned(config)
    assert arithmetic(precision, spread.stage) == expected
    assert (forward.compute_bytes, forward.residual_bytes, spread.weight_bytes) == (
        compute_bytes,
        weight_bytes,
        weight_bytes,
    )
    assert deepspeed_config(config, 4, precision, 10**6)["bf16"]["enabled"] is (expected == "bf16")


def test_gradients_are_summed_early_at_stage_3_unless_told_otherwise():
    for sharding, early in {
        "none": False,
        "optimizer": False,
        "gradients": False,
        "full": True,
        "hybrid": True,
    }.items():
        config = run(sharding=sharding)
        assert overlaps(config) is early
        assert deepspeed_config(config, 4, "fp32", 10**6)["zero_optimization"]["overlap_comm"] is early
    assert overlaps(run(sharding="gradients", overlap_communication="on"))
    assert not overlaps(run(sharding="full", overlap_communication="off"))


def test_a_rank_cuts_its_rows_into_micro_batches_and_ranks_that_share_rows_count_once():
    config = run(batch_size=70, micro_batch_size=8)
    assert (rows_per_rank(config, 4), accumulation_steps(config, 4)) == (18, 3)
    shared = load_config(
        "model/1m",
        ["training.batch_size=64", "training.micro_batch_size=8", "parallel.sequence=2"],
        beneath={"corpus": {"path": "corpora/none"}},
    )
    assert (rows_per_rank(shared, 4), accumulation_steps(shared, 4)) == (32, 4)
    assert Spread.of(shared, 4, "fp32").micro_batches == 4
    told = deepspeed_config(shared, 4, "fp32", 10**6)
    assert (told["gradient_accumulation_steps"], told["train_batch_size"]) == (4, 16)
