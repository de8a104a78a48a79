"""The arithmetic of model states, beside real DeepSpeed engines."""

import gc
import time
from pathlib import Path

import pytest
import torch

from pretrain.batch import Batch
from pretrain.config.load import validate
from pretrain.config.training import OptimizerConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.training.cost.memory import SUB_GROUP, Spread, gradient_partition, model_states
from pretrain.training.zero.optimizer import parameter_groups
from pretrain.training.zero.settings import ZERO_STAGE, Buckets
from tests.ranks import run_on_ranks

VOCAB, LENGTH = 2048, 16
WAYS = [
    *((sharding, "none") for sharding in ("none", "optimizer", "gradients", "full")),
    ("optimizer", "cpu"),
    ("gradients", "nvme"),
    ("full", "nvme"),
]
"""`sharding` and `offload`; `nvme` has in memory and files what `cpu` has in memory."""


def config_of(sharding: str, precision: str, world_size: int, **training: str):
    return validate(
        {
            "name": "x",
            "corpus": {"path": "none"},
            "data": {"sequence_length": LENGTH},
            "model": {"hidden_size": 88, "num_heads": 2, "num_layers": 2, "unet": True, "qk_norm": True},
            "training": {
                "sharding": sharding,
                "precision": precision,
                "batch_size": 4 * world_size,
                "micro_batch_size": 1,
                **training,
            },
        },
        "test",
    )


def group_sizes(model: torch.nn.Module) -> list[list[int]]:
    return [[p.numel() for p in group["params"]] for group in parameter_groups(model, OptimizerConfig())]


def storages() -> dict[int, int]:
    """Address and bytes of every tensor that Python can reach, gradients included."""
    found, before = reachable(), {}
    while found != before:  # threads of gloo let go of what they have sent a moment after it has arrived
        time.sleep(0.1)
        found, before = reachable(), found
    return found


def reachable() -> dict[int, int]:
    """`storages` of this moment."""
    gc.collect()
    found = {}
    for tensor in [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]:
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is not None and part.device.type == "cpu" and part.untyped_storage().nbytes():
                found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return found


def train(engine, batch: Batch, steps: int) -> int:
    """So many micro-batches of four to a step; returns the elements that were summed over ranks."""
    reduced = []
    all_reduce = engine.collectives.all_reduce

    def counted(tensor, *arguments, **options):
        reduced.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    engine.collectives.all_reduce = counted
    for _ in range(steps):
        engine.backward(engine.forward(batch, AttentionLayout.from_batch(batch))[0].sum())
        engine.step()
    engine.collectives.all_reduce = all_reduce
    return sum(reduced)


def bytes_in_files(folder: Path) -> int:
    """Of the unnamed files in a folder that this process has mapped."""
    mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [fields[0].split("-") for fields in mapped if fields[5:] and fields[5].startswith(str(folder))]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def measure(rank, world_size, folder):
    """Per way to spread: bytes of all tensors but the bucket, of optimizer states, the groups, elements all-reduced,
    bytes in files."""
    from pretrain.training.zero.engine import Engine

    ids = torch.randint(VOCAB, (1, LENGTH))
    batch = Batch(ids, ids, torch.ones_like(ids), torch.arange(LENGTH)[None])
    results = {}
    for precision in ("fp32", "bf16"):
        for sharding, offload in WAYS:
            if precision == "fp32" and offload != "none":
                continue  # a special case of bf16: as many tensors, of one width
            before, files_before = storages(), bytes_in_files(folder)
            config = config_of(sharding, precision, world_size, offload=offload, offload_folder=str(folder))
            model = MaskedLanguageModel(config.model, VOCAB)
            groups = group_sizes(model)
            engine = Engine(model, config, world_size, torch.device("cpu"))
            del model
            train(engine, batch, steps=2)
            states = engine.torch_optimizer.state.values()
            optimizer = sum(value.numel() * 4 for state in states for value in state.values())
            now = {address: size for address, size in storages().items() if before.get(address) != size}
            bucket = Buckets.of(sum(map(sum, groups))).reduced
            weight_bytes = Spread.of(config, world_size, precision).weight_bytes
            total = sum(size for size in now.values() if size != bucket * weight_bytes)
            reduced, files = train(engine, batch, steps=2), bytes_in_files(folder) - files_before
            results[sharding, precision, offload] = (total, optimizer, groups, reduced, files)
            del engine, states
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_model_states_are_exactly_those_of_a_real_engine_on_the_rank_that_holds_most(tmp_path, world_size):
    ranks = run_on_ranks(measure, world_size, tmp_path / "ranks", world_size, tmp_path)
    for way, (_, optimizer, groups, reduced, files) in ranks[0].items():
        sharding, precision, offload = way
        planned = model_states(groups, [2, 2], Spread(ZERO_STAGE[sharding], world_size, precision, 4, offload))
        assert planned.optimizer == (optimizer if offload == "none" else 0), way
        # Every tensor has a file of its own: of each group two moments and, under full, the weights.
        assert 0 <= files - planned.files <= (4096 * 3 * len(groups) if planned.files else 0), way
        most = max(rank[way][0] for rank in ranks)
        # What DeepSpeed keeps beside them: flags and norms of a few bytes, and the batch of this test.
        assert 0 <= most - planned.total - planned.host - planned.files < 1200, (way, most, planned)
        if sharding == "none":
            assert reduced == (sum(map(sum, groups)) if world_size > 1 else 0), "alone there is nobody to sum with"


def test_buckets_are_parts_of_a_small_model_and_what_deepspeed_starts_with_for_a_large_one():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig()
    assert zero.sub_group_size == SUB_GROUP
    assert Buckets.of(15_000_000_000) == Buckets(
        reduced=zero.reduce_bucket_size,
        live=zero.max_live_parameters,
        prefetched=zero.prefetch_bucket_size,
        persistent=zero.param_persistence_threshold,
    )
    assert Buckets.of(16_000_000) == Buckets(2_000_000, 2_000_000, 1_000_000, 1_600)
    assert Buckets.of(1_000_013).reduced % 2 == 0, "DeepSpeed wants an even number"


def test_stage_1_keeps_whole_gradients_only_where_micro_batches_accumulate():
    groups = [[6, 4, 10]]
    gradients = {n: model_states(groups, [2], Spread(1, 2, "bf16", micro_batches=n)).gradients for n in (1, 2)}
    assert gradients == {1: 2 * gradient_partition(groups, 2), 2: 2 * 20}
    assert gradients[1] < gradients[2]


def test_a_parameter_on_the_border_of_two_ranks_has_its_gradient_on_both():
    assert gradient_partition([[6, 4, 10]], 1) == 20
    assert gradient_partition([[6, 4, 10]], 2) == 10
    assert gradient_partition([[6, 8, 6]], 2) == 6 + 8
    assert gradient_partition([[100, 1, 1]], 4) == 100 + 1 + 1
