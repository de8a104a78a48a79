"""Micro-batches of a step, where a phase changes their number."""

import pytest

from pretrain.config.run import RunConfig
from pretrain.run.opening import open_run_folder
from tests.ranks import run_on_ranks
from tests.training.test_training import curve, train


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "gradients"])
def test_a_phase_that_cuts_the_batch_into_more_micro_batches_changes_nothing(make_config, manifest, tmp_path, sharding):
    training = {"tokens": 3_000, "precision": "fp32", "micro_batch_size": 16, "sharding": sharding}
    # After the first step, which is one micro-batch, still one; or four.
    whole, cut = (
        RunConfig.model_validate(
            make_config(name, training=training).model_dump()
            | {"phases": [{"from_tokens": 1, "micro_batch_size": micro_batch_size}]}
        )
        for name, micro_batch_size in (("whole", 16), ("cut", 4))
    )
    for number, config in enumerate((whole, cut)):
        open_run_folder(config, manifest)
        run_on_ranks(train, 1, tmp_path / str(number), config, 1)
    for (_, loss, norm, rows), (_, other_loss, other_norm, other_rows) in zip(curve(whole), curve(cut), strict=True):
        assert rows == other_rows
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)
