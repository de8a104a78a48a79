"""The learning rate as a pure function of tokens seen."""

import pytest

from pretrain.config.training import ScheduleConfig
from pretrain.training.schedule import learning_rate


def test_the_learning_rate_rises_stays_and_falls_by_tokens():
    schedule = ScheduleConfig(warmup=0.1, decay=0.2, final=0.1)
    rates = {t: learning_rate(t, 1000, 2.0, schedule) for t in (1, 50, 100, 500, 800, 900, 1000, 1100)}
    assert rates == pytest.approx(
        {1: 0.02, 50: 1.0, 100: 2.0, 500: 2.0, 800: 2.0, 900: 1.1, 1000: 0.2, 1100: 0.2}, rel=1e-9
    )


def test_without_warmup_and_decay_it_is_the_peak_from_the_first_token_to_the_last():
    schedule = ScheduleConfig(warmup=0, decay=0)
    assert {learning_rate(t, 1000, 2.0, schedule) for t in (0, 5, 1000, 1100)} == {2.0}
