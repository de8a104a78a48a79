"""Loader workers: processes that live as long as their rank."""

import multiprocessing
import os
import signal
from itertools import islice

import pytest

from pretrain.config.parallel import SOLE_READER
from pretrain.data.stream.loader import training_steps
from pretrain.data.stream.state import StreamState


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_worker_outlives_a_signal_that_its_rank_is_to_save_at(make_config, manifest, number):
    before = multiprocessing.active_children()
    steps = training_steps(make_config(data={"workers": 1}), manifest, StreamState.start(16), SOLE_READER)
    first = next(steps)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    os.kill(worker.pid, number)
    later = list(islice(steps, 12))  # more than a worker has made ahead
    assert [step.state.position for step in (first, *later)] == [16 * n for n in range(1, 14)]
    assert worker.is_alive()
