"""`python -m tests.campaign --kills 100 [--seed N]`: SIGKILL ranks of real runs, and see that nothing is lost or left.

Each life of a run is ended at a random moment: while it starts or resumes, while it trains, or (at least every third
time) while it saves; either one rank is killed or all of them. Runs that reach their end are compared with one that was
never broken: losses, gradient norms and row hashes, bit for bit.
"""

import argparse
import contextlib
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.run.attempt import newest_attempt
from pretrain.run.folder import RunFolder
from pretrain.run.lock import is_locked
from tests.conftest import write_texts
from tests.integration.test_whole_runs import living_ranks, start

SURVIVORS_S = 5.0
KINDS = ("save", "start", "train", "save", "resume", "any")
CONFIG = """
corpus: {path: corpus, sources: [{path: raw}], tokenizer: {vocab_size: 120, byte_fallback: false},
  min_train_shards: 16, splits: {valid: 0.1, test: 0.1}}
data: {sequence_length: 32, streams: 16, workers: 1}
model: {hidden_size: 32, num_layers: 2, num_heads: 2}
training: {tokens: 60_000, batch_size: 16, validation_rows: 32, validate_every: 20, log_every: 2, precision: fp32}
checkpoint: {every: 2, keep_last: 3}
"""


class Campaign:
    """Runs in one folder, one after the other, each killed again and again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.chosen = folder, random.Random(seed)
        self.problems: list[str] = []
        self.kills: Counter[str] = Counter()
        self.slowest_end_s = 0.0
        write_texts(folder / "raw", 200)
        (folder / "tiny.yaml").write_text(CONFIG)
        self.runs = self.lives = 0

    def start(self, name: str):
        return start(self.folder, "train", "tiny.yaml", f"name={name}", "--nproc", "2", "--no-evaluate")

    def unbroken(self) -> None:
        """What the others are compared with."""
        launcher = self.start("whole")
        assert launcher.wait(timeout=200) == 0
        self.expected = curve(self.folder / "runs" / "whole")

    def one_run(self, kills: int) -> None:
        """Kill a run `kills` times, fewer if it ends before; then let it end."""
        self.runs += 1
        name = f"broken-{self.runs:03d}"
        for _ in range(kills):
            kind = KINDS[self.lives % len(KINDS)]
            self.lives += 1
            if not self.one_life(name, kind):
                break
        else:
            code = self.start(name).wait(timeout=300)
            self.expect(code == 0, f"{name}: the last life ended with {code}")
        found = curve(self.folder / "runs" / name)
        self.expect(found == self.expected, f"{name} differs from the unbroken run")

    def one_life(self, name: str, kind: str) -> bool:
        """Start, wait for the moment, kill, look; False if the run was done before its moment came."""
        run = self.folder / "runs" / name
        before = newest_attempt(RunFolder(run))
        launcher = self.start(name)
        if not self.wait_for_the_moment(run, launcher, kind, before):
            code = launcher.wait(timeout=60)
            self.expect(code == 0, f"{name} ended with {code} before its kill")
            return False
        ranks = living_ranks(run)
        ports = {port_of(pid) for pid in ranks} - {None}
        victims = ranks if self.chosen.random() < 0.5 else ranks[:1] if self.chosen.random() < 0.5 else ranks[-1:]
        for pid in victims:
            kill(pid)
        killed = time.monotonic()
        while living_ranks(run) and time.monotonic() - killed < 30:
            time.sleep(0.02)
        took = time.monotonic() - killed
        code = launcher.wait(timeout=60)
        if code == 0:  # the moment was after its last write
            return False
        self.kills[kind] += 1
        self.slowest_end_s = max(self.slowest_end_s, took)
        self.expect(code == 1, f"{name}: killed in {kind}, the launcher ended with {code}")
        self.expect(took < SURVIVORS_S, f"{name}: killed in {kind}, the survivors took {took:.1f} s to end")
        self.look_for_remains(run, ranks, ports)
        return True

    def wait_for_the_moment(self, run: Path, launcher, kind: str, before: int) -> bool:
        """False if the run ends first. Moments are drawn in seconds, or in saves, after what they wait for."""
        draw = self.chosen.random()
        saves_left, seen = 1 + int(draw * 4), set()
        end = time.monotonic() + 120
        deadline = None
        while launcher.poll() is None and time.monotonic() < end:
            ranks = living_ranks(run)
            if len(ranks) == 2 and deadline is None:
                if kind in ("start", "resume"):
                    deadline = time.monotonic() + draw * 6
                elif kind == "any":
                    deadline = time.monotonic() + draw * 12
                elif kind == "train" and is_training(run, before):
                    deadline = time.monotonic() + draw * 2
            if deadline is not None and time.monotonic() >= deadline:
                return True
            if kind == "save":
                seen |= {path.name for path in (run / "checkpoints").glob(".step-*.tmp")}
                if len(seen) >= saves_left:
                    time.sleep(self.chosen.random() * 0.03)
                    return launcher.poll() is None
            time.sleep(0.001 if kind == "save" else 0.01)
        return False

    def look_for_remains(self, run: Path, ranks: list[int], ports: set[int]) -> None:
        self.expect(not living_ranks(run), f"{run.name}: ranks are left")
        self.expect(not is_locked(RunFolder(run)), f"{run.name}: the lock is held")
        for port in ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.expect(probe.connect_ex(("127.0.0.1", port)) != 0, f"{run.name}: port {port} is served")
        shared = [p.name for p in Path("/dev/shm").iterdir() if any(f"_{pid}_" in p.name for pid in ranks)]
        self.expect(not shared, f"{run.name}: shared memory is left: {shared}")
        folder = run / "checkpoints"
        whole = list_checkpoints(folder)
        self.expect(len(list(folder.glob("step-*"))) == len(whole), f"{run.name}: a step folder without manifest")
        for path in whole:
            self.expect(not verify_checkpoint(path), f"{run.name}: {path.name} does not verify")

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)
            print(f"PROBLEM: {problem}", flush=True)


def curve(run: Path) -> list[tuple]:
    records = [record for record in RunFolder(run).metrics() if "loss" in record]
    return [(r["step"], r["loss"], r["grad_norm"], r["rows_checksum"]) for r in records]


def is_training(run: Path, before: int) -> bool:
    """Whether this life, whose attempt comes after `before`, has come to its first step."""
    status = RunFolder(run).status()
    return status is not None and status.attempt is not None and status.attempt > before and status.state == "training"


def port_of(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v.removeprefix(b"MASTER_PORT=")) for v in variables if v.startswith(b"MASTER_PORT=")), None)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def run_campaign(kills: int, seed: int, folder: Path) -> Campaign:
    """As the command; returns what was found."""
    campaign = Campaign(folder, seed)
    campaign.unbroken()
    began = time.monotonic()
    while (left := kills - sum(campaign.kills.values())) > 0:
        campaign.one_run(min(left, 12))
        done = sum(campaign.kills.values())
        minutes = (time.monotonic() - began) / 60
        print(f"{done} kills in {campaign.runs} runs, {len(campaign.problems)} problems, {minutes:.1f} min", flush=True)
    return campaign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="campaign ") as folder:
        campaign = run_campaign(arguments.kills, arguments.seed, Path(folder))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(campaign.kills.items()))
    print(f"kills: {kinds}; slowest end {campaign.slowest_end_s:.1f} s; {len(campaign.problems)} problems")
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
