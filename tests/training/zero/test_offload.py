"""The optimizer in the host's memory or in files: the run is the one that it is without, and moves there and back."""

import math

import pytest

from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from tests.ranks import run_on_ranks
from tests.training.test_training import curve, poisoned, skipped, train

OFFLOAD = {"optimizer": "cpu", "gradients": "nvme", "full": "nvme"}
"""By `sharding`."""


def by_group(config) -> list[dict[str, float]]:
    """Gradient norms and update/weight ratios of each step that is looked at."""
    records = [r for r in RunFolder(config.run_folder).metrics() if "grad_norms" in r]
    assert [r["step"] for r in records] == list(range(2, records[-1]["step"] + 1, 2))
    return [
        {f"{kind} {name}": value for kind in ("grad_norms", "update_ratios") for name, value in r[kind].items()}
        for r in records
    ]


def train_plain_and_moved(rank, cases, bad):
    """Of each case a whole run, and one that is stopped twice and moves to the host's memory, away and back."""
    codes = []
    for plain, away, offloaded in cases:
        pieces = [train(rank, config, 2, steps) for config, steps in ((offloaded, 3), (away, 2), (offloaded, None))]
        codes.append([train(rank, plain, 2), *pieces])
    return codes, [poisoned(rank, config, 2, "inf gradient", {3}) for config in bad]


@pytest.mark.slow
def test_a_run_moves_to_the_hosts_memory_and_back_as_if_it_had_not_and_skips_steps_there(
    make_config, manifest, tmp_path
):
    cases, bad = [], []
    for sharding, place in OFFLOAD.items():
        shared = {"sharding": sharding, "precision": "fp32", "tokens": 4_000, "log_every": 2}
        offload = {**shared, "offload": place, "offload_folder": str(tmp_path)}
        cases.append(
            [
                make_config(f"{sharding}-plain", training={**shared, "overlap_communication": "on"}),
                make_config(f"{sharding}-moved", training=shared),
                make_config(f"{sharding}-moved", training=offload),
            ]
        )
        bad.append(make_config(f"{sharding}-bad", training={**offload, "offload": "cpu", "precision": "bf16"}))
        for config in (cases[-1][0], cases[-1][2], bad[-1]):
            open_run_folder(config, manifest)
    for codes, ends in run_on_ranks(train_plain_and_moved, 2, tmp_path / "ranks", cases, bad):
        assert codes == [[0, 75, 75, 0]] * 3
        assert [(code, finite) for code, finite, *_ in ends] == [(0, True)] * 3
    for plain, _, moved in cases:
        for (step, loss, norm, rows), (other_step, other_loss, other_norm, other_rows) in zip(
            curve(plain), curve(moved), strict=True
        ):
            assert (step, rows) == (other_step, other_rows)
            assert (loss, norm) == pytest.approx((other_loss, other_norm), rel=2e-6)
        for record, other in zip(*(by_group(config) for config in (plain, moved)), strict=True):
            assert record == pytest.approx(other, rel=1e-4)
            assert math.hypot(*record.values()) > 0
    for config in bad:
        assert skipped(config) == [3]


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"offload": "cpu", "sharding": "none"}}, "offload works with optimizer, gradients"),
        ({"training": {"offload": "cpu", "sharding": "hybrid"}}, "offload works with optimizer, gradients"),
        ({"training": {"offload": "nvme"}}, "offload_folder is not set"),
        ({"training": {"offload": "cpu"}, "optimizer": {"kind": "muon"}}, "too much for the host"),
        ({"training": {"overlap_communication": "on", "sharding": "none"}}, "nothing is summed early"),
    ],
)
def test_what_cannot_be_together_is_refused_with_the_reason(make_config, sections, reason):
    with pytest.raises(UserError, match=reason):
        make_config(**sections)
