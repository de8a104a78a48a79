"""What fits, what is recommended, and what to change where nothing fits."""

import pytest

from pretrain.config.load import load_config
from pretrain.config.run import RunConfig
from pretrain.training.cost.advice import advice, remedies
from pretrain.training.cost.hardware import GIB, USABLE, Hardware
from pretrain.training.cost.need import sent_for_attention
from pretrain.training.cost.plan import Choice, MemoryPlan

VOCAB = 32_768


def run(*overrides: str, size: str = "1b") -> RunConfig:
    values = ["data.sequence_length=1024", "training.batch_size=1024", *overrides]
    return load_config(f"model/{size}", values, beneath={"corpus": {"path": "corpora/none"}})


def gpus(gib: float, number: int = 8) -> Hardware:
    return Hardware("gpu", int(gib * GIB), number, True, number)


def planned(config: RunConfig, hardware: Hardware) -> MemoryPlan:
    return MemoryPlan(config, VOCAB, hardware)


def test_the_least_work_that_fits_is_recommended():
    recommended = {gib: planned(run(), gpus(gib)).recommended() for gib in (2000, 70, 40, 12)}
    assert recommended[2000] == Choice("optimizer", 0, 128)
    assert recommended[70].checkpoint_every == 0
    assert recommended[70].micro_batch_size == 32
    assert (recommended[40].checkpoint_every, recommended[40].micro_batch_size) == (0, 16)
    assert recommended[12].checkpoint_every > 0 or recommended[12].sharding != "optimizer"
    for gib, choice in recommended.items():
        assert planned(run(), gpus(gib)).need(choice).total <= USABLE * gib * GIB


def test_a_rank_alone_shares_nothing_unless_that_would_be_autocast():
    processor = Hardware("cpu", 64 * GIB, 1, False, 1)
    alone = planned(run("training.precision=fp32", size="15m"), processor)
    assert alone.recommended().sharding == alone.smallest.sharding == "none"
    others = [Choice(sharding, 1, 1) for sharding in ("optimizer", "gradients", "full")]
    assert all(alone.need(alone.smallest).total < alone.need(choice).total for choice in others)
    for config, hardware in (
        (run("training.precision=bf16", size="15m"), processor),
        (run("training.precision=fp32", "training.offload=cpu", size="15m"), processor),
        (run("training.precision=fp32", "training.overlap_communication=on", size="15m"), processor),
        (run("training.precision=fp32", size="15m"), Hardware("cpu", 64 * GIB, 2, False, 2)),
    ):
        assert planned(config, hardware).recommended().sharding == "optimizer"


def test_more_sharding_recomputation_or_fewer_rows_never_need_more_activations():
    plan = planned(run(), gpus(79))
    peaks = [plan.need(Choice("optimizer", every, 32)).activations.peak for every in (0, 2, 1)]
    assert peaks == sorted(peaks, reverse=True)
    rows = [plan.need(Choice("full", 0, micro)).activations.peak for micro in (1, 2, 4, 8)]
    assert rows == pytest.approx([rows[0] * k for k in (1, 2, 4, 8)], rel=0.01)
    states = [plan.need(Choice(sharding, 0, 4)).states.total for sharding in ("none", "optimizer", "gradients", "full")]
    assert states == sorted(states, reverse=True)


def test_a_save_in_the_background_copies_to_the_hosts_memory_unless_there_are_files():
    full = Choice("full", 0, 4)
    saves = {on: planned(run(f"checkpoint.async={on}"), gpus(79)).need(full) for on in ("true", "false")}
    plan = planned(run(), gpus(79))
    assert saves["true"].host == -(-12 * plan.parameters // 8)
    assert saves["false"].host == 0
    assert saves["true"].total == saves["false"].total
    on_host = [
        planned(run(f"checkpoint.async={on}"), Hardware("cpu", 64 * GIB, 8, False, 8)).need(full).total
        for on in ("true", "false")
    ]
    assert on_host[0] - on_host[1] == saves["true"].host
    offload = ["training.sharding=full", "training.offload_folder=/disk"]
    places = {p: planned(run(*offload, f"training.offload={p}"), gpus(79)).need(full) for p in ("cpu", "nvme")}
    assert places["cpu"].saved == saves["true"].saved
    assert places["nvme"].saved == 0, "from files it saves without a copy"
    assert places["nvme"].host + places["nvme"].states.files == places["cpu"].states.host


def test_the_plan_is_for_the_phase_whose_micro_batches_need_most():
    long = {"from_tokens": 1000, "sequence_length": 8192, "micro_batch_size": 2}
    short = {"from_tokens": 2000, "sequence_length": 128}
    config = run().model_copy(
        update={"phases": RunConfig.model_validate(run().model_dump() | {"phases": [long, short]}).phases}
    )
    plan = planned(config, gpus(79))
    assert (plan.phase, plan.config.data.sequence_length) == (0, 1024)  # 32 rows of 1024
    wide = long | {"micro_batch_size": 32}
    plan = planned(RunConfig.model_validate(run().model_dump() | {"phases": [wide, short]}), gpus(79))
    assert (plan.phase, plan.config.data.sequence_length) == (1, 8192)


@pytest.mark.parametrize("sharding", ["none", "optimizer", "hybrid"])
def test_where_nothing_fits_every_remedy_does(sharding):
    overrides = ("data.streams=4096", "training.batch_size=4096", "data.sequence_length=32768")
    config = run(*overrides, f"training.sharding={sharding}")
    plan = planned(config, gpus(24, number=1))
    assert plan.recommended() is None
    devices, offload, shorter, larger = remedies(plan)
    number = int(devices.split()[1])
    assert planned(config, gpus(24, number)).fits(plan.smallest)
    assert not planned(config, gpus(24, number // 2)).fits(plan.smallest)
    told = offload.split("offload=nvme): ")[1].split()
    moved = planned(run(*overrides, *told), gpus(24, number=1))
    assert moved.fits(moved.configured)
    assert shorter.startswith("shorten rows to data.sequence_length=")
    assert planned(config, gpus(int(larger.split()[3].replace(",", "")), 1)).fits(plan.smallest)


def test_advice_after_running_out_of_memory_needs_much_less_than_the_run_did():
    config = run("training.micro_batch_size=64")
    text = advice(config, VOCAB, gpus(79))
    changed = dict(part.split("=") for part in text.split() if part.startswith("training."))
    choice = Choice(changed["training.sharding"], 0, int(changed["training.micro_batch_size"]))
    plan = planned(config, gpus(79))
    assert changed["training.activation_checkpointing"] == "none"
    assert plan.need(choice).total <= 0.8 * plan.need(plan.configured).total
    assert "use devices of" in advice(run("data.sequence_length=1048576"), VOCAB, gpus(4, number=1))


def test_shared_rows_need_their_part_of_the_activations_and_are_advised_where_nothing_else_fits():
    rows = ("data.sequence_length=1048576", "training.batch_size=8", "model.num_layers=2")
    whole, shared = (planned(run(*rows, f"parallel.sequence={n}", size="50m"), gpus(16)) for n in (1, 8))
    one_row = Choice("optimizer", 0, 1)
    assert whole.need(one_row).states.weights == shared.need(one_row).states.weights
    parts = [plan.need(one_row).activations.peak for plan in (whole, shared)]
    # Whole rows are read where the projection left them, which is kept as well.
    assert 0.85 * parts[0] / 8 < parts[1] < parts[0] / 8
    assert shared.micro_batch_sizes == [1, 2, 4, 8]
    assert shared.recommended() == one_row
    # Four tensors of all heads, there and back, in two layers of bf16; an eighth of what is sent stays.
    tensor = 8 * 2**20 // 8 * 512 * 2
    assert sent_for_attention(one_row.applied_to(shared.config), shared.hardware) == 2 * 4 * 2 * tensor * 7 // 8
    assert sent_for_attention(one_row.applied_to(whole.config), whole.hardware) == 0
    assert whole.recommended() is None
    assert "share rows by parallel.sequence=8" in remedies(whole)
