"""Building the model: the same weights for every sharding, and under `full` never whole on one rank."""

import pytest
import torch

from pretrain.model.encoder import MaskedLanguageModel
from tests.ranks import run_on_ranks
from tests.training.test_memory import VOCAB, config_of


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
