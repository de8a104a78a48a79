"""What the watchdog sees in heartbeats, whom it blames, and when it ends a rank."""

import json
import multiprocessing
import os
import time
from dataclasses import asdict

import pytest

from pretrain.config.training import SupervisionConfig
from pretrain.errors import EXIT_RESUME_ME, EXIT_SUPERSEDED
from pretrain.run.attempt import Attempt, take_attempt
from pretrain.run.folder import RunFolder
from pretrain.training.monitor import watchdog as module
from pretrain.training.monitor.diagnosis import diagnose, silent_ranks
from pretrain.training.monitor.heartbeats import Heartbeat, Sighting, end_of, heartbeat_path, look_at
from pretrain.training.monitor.watchdog import Watchdog


@pytest.fixture
def attempt(tmp_path) -> Attempt:
    return take_attempt(RunFolder(tmp_path))


def sightings(*places, ages=()):
    """Of each rank, its step and what it is doing."""
    ages = dict(enumerate(ages))
    return {
        rank: Sighting(Heartbeat(rank, "another", 1, step, doing, 7.0), ages.get(rank, 0.0))
        for rank, (step, doing) in enumerate(places)
    }


def test_the_age_of_a_heartbeat_is_told_by_the_clock_of_the_newest(attempt):
    """The file server's clock may be hours from that of any node."""
    for rank, written in enumerate([131.0, 100.0, 130.5]):
        path = heartbeat_path(attempt, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(Heartbeat(rank, "a", 1, 2, "computing", 0.5))))
        os.utime(path, (written, written))
    heartbeat_path(attempt, 3).write_text("{half of i")
    found = look_at(attempt, range(5))
    assert {rank: sighting.age_s for rank, sighting in found.items()} == {0: 0.0, 1: 31.0, 2: 0.5}
    assert found[1].heartbeat == Heartbeat(1, "a", 1, 2, "computing", 0.5)


def test_a_rank_is_silent_when_it_has_missed_more_than_five_ticks():
    seen = sightings(*[(1, "computing")] * 3, ages=[2.5, 2.6, 0.0])
    assert silent_ranks(seen, 4, tick_s=0.5) == [1]
    assert diagnose(seen, 3, tick_s=0.5).startswith("1 rank silent: rank 1 (process 1 on another) is silent since ")


@pytest.mark.parametrize(
    ("places", "diagnosis"),
    [
        ([(5, "computing"), (5, "reading rows"), (5, "computing")], "1 rank behind: rank 1 is reading rows, step 5"),
        ([(5, "reading rows"), (4, "saving"), (4, "saving")], "2 ranks behind: rank 1 is saving, step 4, for 7 s; ra"),
        ([(5, "agreeing on the step"), (5, "reading rows"), (5, "saving")], "1 rank behind: rank 1 is reading rows"),
        ([(5, "computing"), (5, "computing"), (5, "saving")], "no rank makes progress: all 3 are computing, step 5"),
        ([(5, "computing"), (5, "computing")], "1 rank never seen: rank 2"),
    ],
)
def test_who_holds_the_others_up_is_told_by_step_and_place(places, diagnosis):
    assert diagnose(sightings(*places), 3, tick_s=1.0).startswith(diagnosis)


def main_loop(attempt, events, moves, unsaved, is_asked):
    """A rank that moves for so many seconds, and then hangs."""
    module.ORDERLY_S = 0.5
    limits = SupervisionConfig(silence_s=1.0, long_silence_s=60.0)
    watchdog = Watchdog(attempt, 0, 1, limits, lambda: is_asked, events.put)
    end = time.monotonic() + moves
    while time.monotonic() < end:
        watchdog.note(3, "computing", unsaved=unsaved)
        time.sleep(0.05)
    watchdog.note(4, "computing", unsaved=unsaved)
    time.sleep(20)


@pytest.fixture
def hang(attempt):
    """Runs `main_loop` in a process of its own; returns exit code, seconds, and what was told."""
    context = multiprocessing.get_context("fork")
    started = []

    def run(moves=0.0, *, unsaved=True, is_asked=False):
        events = context.SimpleQueue()
        process = context.Process(target=main_loop, args=(attempt, events, moves, unsaved, is_asked))
        began = time.monotonic()
        process.start()
        started.append(process)
        process.join(15)
        return process.exitcode, time.monotonic() - began, None if events.empty() else events.get()

    yield run
    for process in started:
        process.kill()


def test_a_main_loop_that_has_not_moved_for_too_long_is_ended_to_be_resumed_and_one_that_moves_is_not(attempt, hang):
    code, seconds, told = hang(moves=2.0)
    assert code == EXIT_RESUME_ME
    assert seconds > 2.0 + 1.0 - 0.3
    assert told.startswith("no rank makes progress: all 1 are computing, step 4, for 1 s")
    assert end_of(attempt) == told


def test_a_rank_that_is_asked_to_stop_with_nothing_to_save_is_ended_soon(hang):
    assert hang(unsaved=False, is_asked=True)[::2] == (EXIT_RESUME_ME, "stopped while computing, with nothing to save")


def test_a_rank_that_is_asked_to_stop_and_has_steps_to_save_is_given_its_time(hang):
    code, seconds, told = hang(is_asked=True)
    assert (code, told.partition(":")[0]) == (EXIT_RESUME_ME, "no rank makes progress")
    assert seconds > 1.0


def test_a_rank_whose_run_has_been_taken_over_is_ended_soon(attempt, hang):
    take_attempt(attempt.run)
    assert hang()[::2] == (EXIT_SUPERSEDED, None)
