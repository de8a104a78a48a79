"""What counts as a spike, with losses made up for it."""

import math
import random

import pytest

from pretrain.config.training import TrainingConfig
from pretrain.training.guards import ENOUGH, Guard
from pretrain.training.monitor.metrics import Straggler, slowest


def guard_after(losses, **settings):
    guard = Guard(TrainingConfig(**{"spikes": "skip", **settings}))
    for loss in losses:
        guard.count(None, loss)
    return guard


def noisy(count, mean=3.0, deviation=0.05, seed=0):
    chosen = random.Random(seed)
    return [chosen.gauss(mean, deviation) for _ in range(count)]


def test_ordinary_noise_is_no_spike_and_a_spike_is_one():
    guard = guard_after(noisy(128))
    assert all(guard.objection(loss) is None for loss in noisy(10_000, seed=1))
    assert "is a spike" in guard.objection(4.0)
    assert guard.objection(guard.limit()) is None
    assert "is a spike" in guard.objection(math.nextafter(guard.limit(), math.inf))
    assert guard.limit() == pytest.approx(3.0 + 10 * 0.05, abs=0.15)


def test_a_falling_loss_is_no_spike():
    guard, count = Guard(TrainingConfig()), 0
    for step, noise in enumerate(noisy(2_000, mean=0.0)):
        loss = 7.0 * math.exp(-step / 300) + 2.5 + noise
        count += guard.objection(loss) is not None
        guard.count(None, loss)
    assert count == 0


def test_a_few_wild_losses_do_not_move_the_limit_far():
    calm = guard_after(noisy(128)).limit()
    assert guard_after(noisy(108) + [50.0] * 20).limit() == pytest.approx(calm, abs=0.25)


def test_losses_of_long_ago_are_forgotten():
    assert guard_after([50.0] * 1_000 + noisy(128)).limit() == guard_after(noisy(128)).limit()


def test_nothing_is_a_spike_before_enough_losses_are_known_nor_right_after_a_phase_begins():
    assert guard_after([3.0] * (ENOUGH - 1)).objection(1e9) is None
    guard = guard_after([3.0] * ENOUGH)
    assert guard.objection(4.0)
    guard.enter(1)
    assert guard.objection(4.0) is None
    for loss in noisy(ENOUGH):
        guard.enter(1)
        guard.count(None, loss)
    assert guard.objection(4.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_objected_to_from_the_first_step_on(loss):
    assert Guard(TrainingConfig()).objection(loss) == "its loss is not finite"


def test_losses_that_happen_to_be_equal_do_not_make_a_spike_of_the_next():
    assert guard_after([3.0] * 128).objection(3.2) is None


def test_a_run_must_stop_when_enough_steps_in_a_row_were_skipped():
    guard, stops = Guard(TrainingConfig(max_skipped_steps=2)), []
    for is_skipped in (True, False, True, True, False):
        guard.count("its loss is not finite" if is_skipped else None, 3.0)
        stops.append(guard.must_stop)
    assert stops == [False, False, False, True, False]


def test_a_guard_that_does_not_look_first_names_the_spikes_that_were_taken():
    records = [{"step": 127, "loss": 99.0, "skipped": "its gradient norm is not finite"}, {"step": 128, "loss": 4.0}]
    (line,) = guard_after(noisy(128), spikes="off").review(records)
    assert line.startswith("step 128 was taken although its loss of 4.0000 is a spike")
    unseen = guard_after(noisy(127), spikes="off")
    assert list(unseen.review([{"step": 128, "loss": 3.0}])) == []
    assert unseen.limit() == guard_after([*noisy(127), 3.0]).limit()
    looking = guard_after(noisy(128))
    assert list(looking.review(records)) == []
    assert looking.limit() == guard_after(noisy(128)).limit()


@pytest.mark.parametrize("steps", [140, 300], ids=["soon after a phase has begun", "long after"])
def test_a_guard_that_looks_back_at_the_metrics_judges_like_the_one_that_saw_the_steps(steps):
    records, live, tokens = [], Guard(TrainingConfig(max_skipped_steps=3)), 0
    for step, loss in enumerate(noisy(steps)):
        regime = tokens >= 5_000
        live.enter(regime)
        tokens += 50
        record = {"step": step, "tokens": tokens, "loss": loss}
        if step % 40 == 39 or step >= steps - 2:
            live.count("its loss is not finite", loss)
            record["skipped"] = "its loss is not finite"
        else:
            live.count(None, loss)
        records += [record, {"step": step, "tokens": tokens, "validation_loss": 1.0}]
    later = guard_after([50.0] * 128, max_skipped_steps=3)  # of a run that goes back
    later.count("its loss is a spike", 99.0)
    later.replay(records[-512:], lambda seen: seen >= 5_000)
    assert later.limit() == live.limit() < math.inf
    assert (later.skipped_in_a_row, later.reason) == (2, "its loss is not finite")
    assert not later.must_stop
    later.replay([], bool)
    assert (later.skipped_in_a_row, later.reason, later.limit()) == (0, None, math.inf)


def test_the_slowest_rank_is_named_with_its_distance_from_the_others():
    assert slowest([1.0, 1.1, 3.0, 0.9]) == {"slowest_rank": 2, "slowest_by": 3.0}
    assert slowest([2.0, 1.0]) == {"slowest_rank": 0, "slowest_by": 2.0}


def test_a_rank_is_called_slow_once_when_it_has_been_for_a_while():
    straggler = Straggler()
    slow, other = {"slowest_rank": 3, "slowest_by": 2.0}, {"slowest_rank": 3, "slowest_by": 1.2}
    lines = [straggler.look(record) for record in [slow] * 4 + [other] + [slow] * 8]
    assert [line is not None for line in lines] == [False] * 9 + [True] + [False] * 3
    assert "rank 3 is slow" in lines[9]
