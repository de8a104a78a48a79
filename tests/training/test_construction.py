"""What DeepSpeed makes of a config: weights in pieces, and in what gradients are summed."""

import os

import pytest
import torch

from pretrain.batch import Batch
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from tests.ranks import run_on_ranks
from tests.training.test_memory import LENGTH, VOCAB, config_of


def build(rank, world_size):
    """For each precision: the largest tensor that is left of a parameter, and whether weights are those built whole."""
    from pretrain.training.engine import Engine, build_model
    from pretrain.training.fragments import fragments

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
        weights = [piece for piece in fragments(engine) if piece.kind == "weight"]
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


def steps_of(sharding, world_size):
    """Losses of three steps of an engine, and its largest secondary partition of a parameter."""
    from pretrain.training.engine import Engine, build_model

    ids, device = torch.randint(VOCAB, (1, LENGTH)), torch.device("cpu")
    batch = Batch(ids, ids, torch.ones_like(ids), torch.arange(LENGTH)[None])
    config = config_of(sharding, "bf16", world_size)
    torch.manual_seed(config.seed)
    engine = Engine(build_model(config, VOCAB, world_size, device), config, world_size, device)
    engine.set_learning_rate(1e-2)
    losses = []
    for _ in range(3 * 4):
        loss = engine.forward(batch, AttentionLayout.from_batch(batch))[0].mean()
        secondary = [p.ds_secondary_tensor for p in engine.module.parameters()]
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses, max(0 if tensor is None else tensor.ds_numel for tensor in secondary)


def train_on_nodes_of_two(rank, world_size):
    """Of `full` and `hybrid`, on ranks that take themselves for those of two nodes."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.manual_seed(rank)
    batches = torch.get_rng_state()
    found = []
    for sharding in ("full", "hybrid"):
        torch.set_rng_state(batches)
        found.append(steps_of(sharding, world_size))
    return found


@pytest.mark.slow
def test_hybrid_trains_as_full_does_and_its_nodes_keep_the_weights_once_more(tmp_path):
    for found in run_on_ranks(train_on_nodes_of_two, 4, tmp_path / "ranks", 4):
        (full, no_part), (hybrid, part) = found
        assert hybrid == full
        assert full[-1] < full[0]
        assert (no_part, part) == (0, VOCAB * 88 // 2)


def dtypes_of_sums(rank, world_size):
    """By `sharding` and `reduce_dtype`, the types of the larger tensors that a step sums over ranks, in bf16."""
    from pretrain.training.engine import Engine, build_model

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
