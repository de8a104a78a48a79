"""What DeepSpeed makes of a config: weights in pieces, and in what gradients are summed."""

import os

import pytest
import torch

from pretrain.batch import Batch
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from tests.ranks import run_on_ranks
from tests.training.cost.test_memory import LENGTH, VOCAB, config_of


def build(rank, world_size):
    """For each precision: the largest tensor that is left of a parameter, and whether weights are those built whole."""
    from pretrain.training.zero.construction import build_model
    from pretrain.training.zero.engine import Engine

    device, results = torch.device("cpu"), []
    for precision in ("fp32", "bf16"):
        config = config_of("full", precision, world_size)
        torch.manual_seed(config.seed)
        whole = dict(MaskedLanguageModel(config.model, VOCAB).named_parameters())
        torch.manual_seed(config.seed)
        model = build_model(config, VOCAB, world_size, device)
        largest = max(parameter.numel() for parameter in model.parameters())
        engine = Engine(model, config, world_size, device)
        rounded = {name: (p if precision == "fp32" else p.bfloat16()).detach().float() for name, p in whole.items()}
        weights = [piece for piece in engine.partition.fragments() if piece.kind == "weight"]
        same = [bool((p.tensor == rounded[p.parameter].view(-1)[p.start : p.stop]).all()) for p in weights]
        results.append(
            (largest, len(same), all(same), engine.parameter_shapes == {n: p.shape for n, p in whole.items()})
        )
    return results


@pytest.mark.slow
def test_a_model_built_in_pieces_has_the_weights_of_one_built_whole(tmp_path):
    for rank in run_on_ranks(build, 2, tmp_path / "ranks", 2):
        for largest, pieces, same, shapes in rank:
            assert (largest, same, shapes) == (0, True, True)
            assert pieces > 0


def parts_kept_twice(rank, world_size):
    """By parameter, the elements that this rank holds for its node besides its part, on ranks of two nodes."""
    from pretrain.training.zero.construction import build_model
    from pretrain.training.zero.engine import Engine

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    ids, device = torch.randint(VOCAB, (1, LENGTH)), torch.device("cpu")
    batch = Batch(ids, ids, torch.ones_like(ids), torch.arange(LENGTH)[None])
    config = config_of("hybrid", "bf16", world_size)
    engine = Engine(build_model(config, VOCAB, world_size, device), config, world_size, device)
    engine.forward(batch, AttentionLayout.from_batch(batch))
    return {name: (p.ds_numel, p.ds_secondary_tensor.ds_numel) for name, p in engine.module.named_parameters()}


@pytest.mark.slow
def test_under_hybrid_the_two_ranks_of_a_node_keep_the_weights_once_more(tmp_path):
    for kept in run_on_ranks(parts_kept_twice, 4, tmp_path / "ranks", 4):
        # Two ranks' parts of four, which are padded alike.
        assert all(part == 2 * -(-whole // 4) for whole, part in kept.values()), kept


def dtypes_of_sums(rank, world_size):
    """By `sharding` and `reduce_dtype`, the types of the larger tensors that a step sums over ranks, in bf16."""
    from pretrain.training.zero.construction import build_model
    from pretrain.training.zero.engine import Engine

    ids, device, found = torch.randint(VOCAB, (1, LENGTH)), torch.device("cpu"), {}
    batch = Batch(ids, ids, torch.ones_like(ids), torch.arange(LENGTH)[None])
    for sharding in ("optimizer", "gradients", "full"):
        for reduce_dtype in ("auto", "fp32"):
            config = config_of(sharding, "bf16", world_size, reduce_dtype=reduce_dtype)
            engine = Engine(build_model(config, VOCAB, world_size, device), config, world_size, device)
            seen = found[sharding, reduce_dtype] = set()
            for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
                setattr(engine.collectives, name, noting(getattr(type(engine.collectives), name), engine, seen))
            for _ in range(4):
                engine.backward(engine.forward(batch, AttentionLayout.from_batch(batch))[0].sum())
                engine.step()
    return found


def noting(method, engine, seen):
    """The method of DeepSpeed's backend, which also notes the types of what it is given."""

    def call(*arguments, **options):
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.numel() > 100]
        seen.update(str(tensor.dtype) for tensor in tensors)
        return method(engine.collectives, *arguments, **options)

    return call


@pytest.mark.slow
def test_gradients_are_summed_in_what_was_asked_for(tmp_path):
    for rank in run_on_ranks(dtypes_of_sums, 2, tmp_path / "ranks", 2):
        for (sharding, reduce_dtype), seen in rank.items():
            assert seen == {"torch.float32" if reduce_dtype == "fp32" else "torch.bfloat16"}, sharding
