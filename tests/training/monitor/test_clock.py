"""Where a step's time goes."""

import time
from types import SimpleNamespace

import pytest
import torch

from pretrain.training.monitor import clock as timing
from pretrain.training.monitor.clock import SECTIONS, StepClock, Timing, shares
from pretrain.training.zero.timed_collectives import time_collectives


@pytest.fixture
def now(monkeypatch):
    """A time that only tests move."""
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    return clock


class Backend:
    """As DeepSpeed's: a collective takes a second, and one that is waited for two more."""

    def __init__(self, now):
        self.now = now

    def all_reduce(self, tensor, async_op=False):
        self.now.seconds += 1
        return SimpleNamespace(wait=self._wait, done=True) if async_op else None

    def _wait(self):
        self.now.seconds += 2
        return "waited"


def seconds(taken: Timing) -> dict[str, float]:
    return {name: value for name, value in zip(SECTIONS, taken.seconds, strict=True) if value}


def test_collectives_inside_a_section_are_taken_out_of_it_and_so_is_waiting_for_them(now):
    clock, backend = StepClock(torch.device("cpu")), Backend(now)
    time_collectives(backend, StepClock(torch.device("cpu")).section)
    time_collectives(backend, clock.section)  # as the next engine of a process does
    with clock.section("data"):
        now.seconds += 4
    with clock.section("backward"):
        now.seconds += 8
        backend.all_reduce(None)
        work = backend.all_reduce(None, async_op=True)
        now.seconds += 16
        assert (work.wait(), work.done) == ("waited", True)
    now.seconds += 32
    taken = clock.take()
    assert seconds(taken) == {"data": 4, "backward": 24, "communication": 4}
    assert (taken.elapsed, taken.own) == (64, 4)
    assert seconds(clock.take()) == {}


def test_shares_are_of_all_ranks_and_add_up_to_one():
    ranks = [Timing(10.0, (1, 2, 4, 1, 0, 0, 0)), Timing(10.0, (1, 1, 2, 1, 4, 1, 0))]
    together = shares(ranks)
    assert together == {
        "data": 0.1,
        "forward_backward": 0.45,
        "communication": 0.2,
        "optimizer": 0.1,
        "saving": 0.05,
        "validation": 0.0,
        "other": 0.1,
    }
    # A GPU's collectives run beside the computation: what the hosts know of them is not told.
    on_gpu = shares([Timing(10.0, (1, 2, 4, 1, 1, 0, 0), on_gpu=True)])
    assert "communication" not in on_gpu
    assert on_gpu["other"] == pytest.approx(0.2)
    # Its optimizer may still be at work while the host reads.
    assert sum(shares([Timing(9.0, (2, 2, 4, 2, 0, 0, 0), on_gpu=True)]).values()) == pytest.approx(1)


def test_another_threads_time_is_not_counted():
    import threading

    clock = StepClock(torch.device("cpu"))

    def elsewhere():
        with clock.section("saving"):
            time.sleep(0.02)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seconds(clock.take()) == {}
