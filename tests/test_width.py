"""The coordinate check: how far a few steps move a model, over widths."""

import pytest

from benchmarks.width import KINDS, WIDTHS, draw, movement, slopes
from pretrain.run.opening import open_run_folder
from tests.ranks import run_on_ranks, trainer_of
from tests.training.test_training import STAGES, curve


@pytest.mark.slow
def test_under_mup_a_step_moves_every_width_as_far_and_under_standard_wider_models_farther(tmp_path):
    moved = {kind: [movement(kind, width, 5, 3e-3) for width in WIDTHS] for kind in KINDS}
    standard, mup = (slopes(WIDTHS, moved[kind]) for kind in KINDS)
    for part in ("attention", "feed-forward", "last hidden state"):
        assert abs(mup[part]) < 0.1, (part, mup)
    assert -0.5 < mup["logits"] < 0.1
    assert min(standard["attention"], standard["feed-forward"]) > 0.8
    draw(tmp_path / "new" / "check.png", WIDTHS, moved)
    assert (tmp_path / "new" / "check.png").stat().st_size > 5_000


@pytest.mark.slow
def test_under_mup_a_step_of_muon_too_moves_every_width_as_far():
    standard, mup = (slopes(WIDTHS[:3], [movement(k, w, 5, 3e-3, "muon") for w in WIDTHS[:3]]) for k in KINDS)
    for part in ("attention", "feed-forward", "last hidden state"):
        assert abs(mup[part]) < 0.1, (part, mup)
        assert standard[part] > 0.1, (part, standard)


def test_a_slope_is_a_power_of_the_width():
    parts = ("attention", "feed-forward", "last hidden state", "logits")
    moved = [dict.fromkeys(parts, float(width) ** 0.5) for width in (64, 128, 256)]
    assert slopes((64, 128, 256), moved) == pytest.approx(dict.fromkeys(parts, 0.5), abs=1e-5)


def train_each(rank, configs):
    """Exit code, and the largest learning rate of a group over the smallest, at the end of each run."""
    results = []
    for config in configs:
        trainer = trainer_of(config, rank, 2)
        code = trainer.fit()
        rates = [group["lr"] for group in trainer.engine.torch_optimizer.param_groups]
        results.append((code, max(rates) / min(rates)))
    return results


@pytest.mark.slow
def test_the_groups_keep_their_learning_rates_at_every_stage(make_config, manifest, tmp_path):
    """Stage 0 has one tensor per parameter, the others a flat one per group: losses equal only under true rates."""
    configs = []
    for name, model in (("mup", {"parametrization": "mup", "base_width": 8}), ("standard", {})):
        for stage in STAGES:
            training = {"sharding": stage, "precision": "fp32", "tokens": 4_000}
            configs.append(make_config(f"{name}-{stage}", training=training, model=model))
            open_run_folder(configs[-1], manifest)
    assert run_on_ranks(train_each, 2, tmp_path / "ranks", configs) == [[(0, 4.0)] * 4 + [(0, 1.0)] * 4] * 2
    losses = [[loss for _, loss, *_ in curve(config)] for config in configs]
    for number in (1, 2, 3):
        assert losses[number] == pytest.approx(losses[0], abs=1e-4)
        assert losses[4 + number] == pytest.approx(losses[4], abs=1e-4)
    assert abs(losses[0][-1] - losses[4][-1]) > 1e-3
