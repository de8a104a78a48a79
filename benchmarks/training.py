"""Training speed: `python -m benchmarks.training`: Diptych beside a plain PyTorch loop, and two ranks beside one.

A step is what a run takes: rows already read (benchmarks.data measures the reading), the ranks' agreement on it, the
layout, forward, backward, clipping and AdamW, with the clock of the metrics. The plain loop trains the same network,
bidirectional, with torch.compile and without (benchmarks/plain.py). `Diptych` is a run of one rank as a user sets it
up for speed, on a CPU `training.sharding=none training.compile=on`, and `defaults` what it is without these words. All
are in one process and take turns; peaks of memory and the ranks of the weak scaling are processes of their own.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.plain import PlainLoop
from benchmarks.timing import Row, Sense, command, compare, machine, paired, write_results
from pretrain.batch import Batch
from pretrain.config.load import load_config
from pretrain.config.run import RunConfig
from pretrain.training.collectives import agree_on_step
from pretrain.training.cost.flops import flops_per_token, peak_flops
from pretrain.training.mock_step import largest_batch
from pretrain.training.monitor.clock import StepClock, shares
from pretrain.training.monitor.norms import Inspection
from pretrain.training.monitor.peak_memory import PeakMemory
from pretrain.training.ranks import end_rank
from pretrain.training.step import train_step
from pretrain.training.zero.construction import build_model, load_deepspeed
from pretrain.training.zero.engine import Engine

RESULTS = Path(__file__).parent / "results"
ANSWER = "answer.json"
"""What a process of its own writes."""
VOCABULARY = 4096
Shape = tuple[str, int, int]
"""A model, rows of a step of one rank, and their length."""
CPU: list[Shape] = [("15m", 8, 256), ("15m", 2, 1024)]
GPU: list[Shape] = [("133m", 64, 512), ("400m", 32, 512), ("1b", 16, 512)]
FOR_SPEED = () if torch.cuda.is_available() else ("training.sharding=none", "training.compile=on")
"""On a GPU blocks are compiled by default, and bf16 without sharding would be autocast."""
MUON, NORMS = "Diptych, Muon", "Diptych, norms by group at every step"
NOT_COMPILED = ("training.sharding=none", "training.compile=off")
TO_REACH = {"133m": {"tokens a second": 327_680, "MFU": 0.5}, "1b": {"MFU": 0.62}}
"""On one H200: what was published for a bidirectional encoder of 133 M, and shares of the peak, triangles as such."""


def make_config(shape: Shape, ranks: int = 1, *overrides: str, attention: str = "dual_triangle") -> RunConfig:
    """A run of full rows."""
    size, rows, length = shape
    return load_config(
        f"model/{size}",
        [
            "name=benchmark",
            "corpus.path=/nowhere",
            f"data.sequence_length={length}",
            "data.packing=padded",
            f"model.attention={attention}",
            f"training.batch_size={rows * ranks}",
            f"training.micro_batch_size={rows}",
            f"training.precision={'bf16' if torch.cuda.is_available() else 'fp32'}",
            *overrides,
        ],
    )


class DiptychLoop:
    """The step of a run."""

    def __init__(self, config: RunConfig, ranks: int, device: torch.device, inspect: bool = False) -> None:
        """`inspect` takes the norms by group in every step, not at log steps alone."""
        self._config, self._ranks, self._inspect = config, ranks, inspect
        self.clock = StepClock(device)
        self.engine = Engine(build_model(config, VOCABULARY, ranks, device), config, ranks, device)
        self.engine.set_learning_rate(1e-4)

    def step(self, batch: Batch) -> None:
        """One update."""
        with self.clock.section("communication"):
            totals = agree_on_step(batch, 0, False, self.engine.sequence)
        inspection = Inspection(self.engine) if self._inspect else None
        train_step(self.engine, batch, totals, clock=self.clock, inspection=inspection)


def join(rank: int, ranks: int, folder: str) -> torch.device:
    """Make this process one of the ranks, on one thread where there are several."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    kind = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(kind, f"file://{folder}/meeting", timedelta(minutes=10), ranks, rank)
    load_deepspeed(device)
    return device


def rank_of_weak_scaling(rank: int, ranks: int, shape: Shape, steps: int, folder: str) -> None:
    """Seconds of each step, one thread a rank."""
    torch.set_num_threads(1)
    device = join(rank, ranks, folder)
    config = make_config(shape, ranks)
    batch, loop = largest_batch(config, shape[1], VOCABULARY), DiptychLoop(config, ranks, device)
    seconds = paired({"step": lambda: loop.step(batch)}, steps)["step"]
    if rank == 0:
        (Path(folder) / ANSWER).write_text(json.dumps(seconds))
    dist.barrier()
    end_rank(0)


def make_loop(kind: str, shape: Shape, device: torch.device) -> DiptychLoop | PlainLoop:
    """One of what is compared."""
    if kind.startswith("plain"):
        return PlainLoop(make_config(shape).model, VOCABULARY, device, compiled=kind == "plain, compiled")
    config = {
        "Diptych": make_config(shape, 1, *FOR_SPEED),
        "Diptych, not compiled": make_config(shape, 1, *NOT_COMPILED),
        "Diptych, defaults": make_config(shape),
        "Diptych, bidirectional": make_config(shape, 1, *FOR_SPEED, attention="bidirectional"),
        MUON: make_config(shape, 1, *FOR_SPEED, "optimizer.kind=muon"),
        NORMS: make_config(shape, 1, *FOR_SPEED),
    }[kind]
    return DiptychLoop(config, 1, device, inspect=kind == NORMS)


def peak_of(_: int, kind: str, shape: Shape, folder: str) -> None:
    """The peak of memory of three steps of a loop, in bytes."""
    device = join(0, 1, folder)
    peak = PeakMemory(device)
    batch = largest_batch(make_config(shape), shape[1], VOCABULARY)
    loop = make_loop(kind, shape, device)
    for _ in range(3):
        loop.step(batch)
    (Path(folder) / ANSWER).write_text(json.dumps([peak.bytes()]))


def spawned(work: Callable[..., None], ranks: int, *arguments: object) -> list[float]:
    """What processes of their own have written."""
    folder = tempfile.mkdtemp(prefix="training-benchmark-")
    try:
        mp.spawn(work, (*arguments, folder), nprocs=ranks)
        return json.loads((Path(folder) / ANSWER).read_text())
    finally:
        shutil.rmtree(folder)


def against_the_plain_loop(shape: Shape, rounds: int, device: torch.device) -> list[Row]:
    """Diptych and plain loops in turn, and where Diptych's time goes."""
    size, rows, length = shape
    config = make_config(shape)
    batch, tokens = largest_batch(config, rows, VOCABULARY), rows * length
    pairs: list[tuple[str, str, Sense | None, float | None]] = [
        ("Diptych", "plain, compiled", "at most", 1.0),
        ("Diptych", "plain", "at most", 1.0),
        ("Diptych", "Diptych, bidirectional", None, None),
    ]
    if device.type == "cpu":
        pairs += [("Diptych, not compiled", "plain", None, None), ("Diptych, defaults", "plain", None, None)]
    names = dict.fromkeys(name for subject, reference, *_ in pairs for name in (subject, reference))
    loops = {name: make_loop(name, shape, device) for name in names}
    counts = {
        sum(p.numel() for p in loop.model.parameters())
        if isinstance(loop, PlainLoop)
        else sum(map(math.prod, loop.engine.parameter_shapes.values()))
        for loop in loops.values()
    }
    assert len(counts) == 1, f"these are not the same network: {counts} parameters"
    calls = {name: (lambda loop=loop: loop.step(batch)) for name, loop in loops.items()}
    seconds = paired(calls, rounds)
    ours = loops["Diptych"]
    assert isinstance(ours, DiptychLoop)
    ours.clock.take()
    for _ in range(rounds):
        ours.step(batch)
    rate = tokens / statistics.median(seconds["Diptych"])
    flops = flops_per_token(config.model, VOCABULARY, length)
    head = flops.head_per_masked_token * batch.num_masked / tokens
    done = {
        "triangles as such": (flops.matrices + flops.attention + head) * rate,
        "attention as full": (flops.matrices + flops.attention_as_full + head) * rate,
    }
    print(f"{size}: {rate:,.0f} tokens/s; " + ", ".join(f"{v / 1e9:,.1f} GFLOP/s ({k})" for k, v in done.items()))
    print(", ".join(f"{name} {share:.1%}" for name, share in shares([ours.clock.take()]).items()))
    reached = {"tokens a second": rate}
    if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name())) is not None:
        reached["MFU"] = done["triangles as such"] / peak
    where = f"{device.type} {size}, {rows} rows of {length}"
    found = [
        compare(
            Row(where, subject, reference, "time of a step, first / second", sense, target),
            seconds[subject],
            seconds[reference],
        )
        for subject, reference, sense, target in pairs
    ]
    return found + (on_a_gpu(size, reached) if device.type == "cuda" else [])


def costs(shape: Shape, rounds: int, device: torch.device) -> list[Row]:
    """What Muon takes more than AdamW, and a step with the metrics of a log step more than one without."""
    size, rows, length = shape
    batch = largest_batch(make_config(shape), rows, VOCABULARY)
    loops = {name: make_loop(name, shape, device) for name in ("Diptych", MUON, NORMS)}
    seconds = paired({name: (lambda loop=loop: loop.step(batch)) for name, loop in loops.items()}, rounds)
    row = Row(f"{device.type} {size}, {rows} rows of {length}", "", "Diptych", "time of a step, first / second")
    return [compare(replace(row, subject=name), seconds[name], seconds["Diptych"]) for name in (MUON, NORMS)]


def on_a_gpu(size: str, reached: dict[str, float]) -> list[Row]:
    """What is to be reached on one H200, with what was; nothing where there was none."""
    found = []
    for quantity, target in TO_REACH.get(size, {}).items():
        row = Row(f"cuda {size}", "Diptych", f"{target:,}", f"{quantity}, first / second", "at least", 1.0)
        if (value := reached.get(quantity)) is None:
            found.append(replace(row, unmeasured="no GPU"))
        else:
            ratio = value / target
            values = {"subject_value": value, "reference_value": float(target), "unit": quantity}
            found.append(replace(row, ratio=ratio, lowest=ratio, highest=ratio, **values))
    return found


def memory(shape: Shape, device: torch.device) -> list[Row]:
    """Peaks of three steps."""
    size, rows, length = shape
    kinds = ("Diptych", "Diptych, defaults", "plain", "plain, compiled")
    peaks = {kind: spawned(peak_of, 1, kind, shape)[0] / 2**20 for kind in kinds}
    found = []
    for subject, reference in (("Diptych", "plain, compiled"), ("Diptych", "plain"), ("Diptych, defaults", "plain")):
        ratio = peaks[subject] / peaks[reference]
        row = Row(
            f"{device.type} {size}, {rows} rows of {length}", subject, reference, "peak of memory, first / second"
        )
        values = {"subject_value": peaks[subject], "reference_value": peaks[reference], "unit": "MiB"}
        found.append(replace(row, ratio=ratio, lowest=ratio, highest=ratio, **values))
    return found


def weak_scaling(shape: Shape, rounds: int) -> Row:
    """Twice the ranks, twice the rows: how much longer a step takes."""
    size, rows, length = shape
    one, two = (spawned(rank_of_weak_scaling, ranks, ranks, shape, rounds) for ranks in (1, 2))
    row = Row(f"cpu {size}, {rows} rows of {length} a rank", "2 ranks", "1 rank", "time of a step, first / second")
    return compare(row, two, one)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns of every loop (15)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    on, rows = machine(), []
    folder = tempfile.mkdtemp(prefix="training-benchmark-")
    device = join(0, 1, folder)
    for shape in GPU if device.type == "cuda" else CPU:
        rows += against_the_plain_loop(shape, options.rounds, device)
        rows += memory(shape, device)
    rows += costs((GPU if device.type == "cuda" else CPU)[0], options.rounds, device)
    dist.destroy_process_group()
    shutil.rmtree(folder)
    if device.type == "cpu":
        rows.append(weak_scaling(CPU[0], options.rounds))
        for size, number, length in GPU:
            where = f"cuda {size}, {number} rows of {length}"
            row = Row(where, "Diptych", "plain, compiled", "time of a step, first / second", "at most", 1.0)
            rows += [replace(row, unmeasured="no GPU"), *on_a_gpu(size, {})]
    write_results(options.out / f"training-{device.type}", "Training beside a plain PyTorch loop", rows, on)
    print(command())


if __name__ == "__main__":
    main()
