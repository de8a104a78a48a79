"""What a supervisor makes of its ranks' ends, second by second, with ranks and a clock of its own."""

import signal
from types import SimpleNamespace

import pytest

from launch.local import supervisor
from launch.local.supervisor import StopRequests, Supervisor, stop_requests
from tests.launch.local.recorder import Recorder


class PlannedRank:
    """A rank that ends with a code at a second, or when it is told to and obeys."""

    def __init__(self, number: int, code: int, at: float, clock: SimpleNamespace, obeys_after: float | None = None):
        self.number, self._code, self._at, self._clock, self._obeys_after = number, code, at, clock, obeys_after
        self.exit_code: int | None = None
        self.terminated_at: float | None = None

    def poll(self) -> bool:
        if self.exit_code is None and self._clock.now >= self._at:
            self.exit_code = self._code
            return True
        return False

    def terminate(self) -> None:
        if self.exit_code is None and self.terminated_at is None:
            self.terminated_at = self._clock.now
            if self._obeys_after is not None:
                self._code, self._at = 75, self._clock.now + self._obeys_after

    def kill(self) -> None:
        self.exit_code = -signal.SIGKILL


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only while the supervisor sleeps, or by `now`."""
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


@pytest.fixture
def watch(clock):
    """Watch ranks (code, second, seconds to obey); what comes of it, and when."""

    def run(*plans: tuple, requests: StopRequests | None = None, attempt: object = None) -> SimpleNamespace:
        ranks = [PlannedRank(number, plan[0], 100 + plan[1], clock, *plan[2:]) for number, plan in enumerate(plans)]
        display = Recorder()
        watched = Supervisor(ranks, requests or StopRequests(), display, attempt)  # type: ignore[arg-type]
        code = watched.watch(lambda: None)
        blamed = [rank.number for rank in watched.failed]
        return SimpleNamespace(code=code, seconds=clock.now - 100, blamed=blamed, text=display.text, ranks=ranks)

    return run


NEVER = float("inf")


def test_a_rank_that_saves_after_another_has_ended_in_order_has_minutes_for_it(watch):
    end = watch((75, 1), (75, 200))
    assert (end.code, end.blamed, end.text) == (75, [], "")


def test_a_rank_that_never_ends_after_the_others_is_killed_in_the_end(watch):
    end = watch((0, 1), (0, NEVER))
    assert (end.code, end.text) == (1, "killed rank 1: it did not end in time")
    assert 300 < end.seconds < 303


def test_when_one_has_died_the_others_are_told_to_end_and_have_seconds_for_it(watch):
    end = watch((0, NEVER), (7, 1), (0, NEVER, 2))
    assert (end.code, end.blamed) == (1, [1])
    assert [rank.exit_code for rank in end.ranks] == [-signal.SIGKILL, 7, 75]
    assert 5 < end.seconds < 6


@pytest.mark.parametrize("other", [-signal.SIGKILL, 2, 3])
def test_of_ranks_that_end_together_the_cause_is_blamed_first_and_not_its_echo(watch, other):
    assert watch((1, 1), (other, 1)).blamed[0] == 1


def test_a_rank_that_ends_before_it_can_hear_leaves_the_others_seconds(watch):
    requests = StopRequests()
    requests.receive(signal.SIGTERM, None)
    end = watch((-signal.SIGTERM, 1), (0, NEVER), requests=requests)
    assert (end.code, end.blamed, end.text.count("killed rank")) == (75, [], 0)
    assert 5 < end.seconds < 6


def test_ranks_that_the_watchdog_ends_can_be_resumed(watch, monkeypatch):
    monkeypatch.setattr(supervisor, "end_of", lambda _: "rank 1 made no step for 600 s")
    end = watch((75, 1), (0, NEVER), attempt=object())
    assert end.code == 75
    assert 5 < end.seconds < 6


def test_two_interrupts_that_are_close_are_one_and_a_later_one_ends_at_once(clock):
    requests = StopRequests()
    for seconds, number, at_once in ((0, 2, False), (0.1, 2, False), (0.9, 15, False), (1.0, 2, True)):
        clock.now = 100 + seconds
        requests.receive(number, None)
        assert (requests.requested, requests.at_once) == (True, at_once)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_signals_are_requests_for_as_long_as_ranks_run(number):
    before = signal.getsignal(number)
    with stop_requests() as requests:
        assert not requests.requested
        signal.raise_signal(number)
        assert requests.requested
    assert signal.getsignal(number) is before
