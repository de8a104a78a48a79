"""Saving, beside DeepSpeed's own `save_checkpoint` of the same engine: `python -m benchmarks.checkpoint`.

On two gloo ranks of the CPU. Needs 20 bytes of memory a parameter and 3 times 12 to 14 bytes of disk (`--folder`).
Writes results/checkpoint-cpu .json and .md; with `--sizes 10` only a part, beside what is there of the others.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.timing import Row, compare, machine, write_results
from pretrain.batch import IGNORED, Batch
from pretrain.checkpoint.folder import remove_checkpoint
from pretrain.checkpoint.format import TrainingState, checkpoint_name
from pretrain.config.load import validate
from pretrain.config.run import RunConfig
from pretrain.data.stream.state import StreamState
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.training.collectives import agree_on_step
from pretrain.training.ranks import end_rank
from pretrain.training.save import CheckpointSaver
from pretrain.training.step import train_step
from pretrain.training.zero.engine import Engine

RANKS = 2
ENCODERS = {
    10: {"hidden_size": 320, "num_layers": 7, "num_heads": 5},
    100: {"hidden_size": 768, "num_layers": 13, "num_heads": 12},
    500: {"hidden_size": 1280, "num_layers": 24, "num_heads": 20},
}
"""Millions of parameters, nearly -> an encoder."""
VOCABULARY = 8192
WITH_STEPS = (10,)
"""Sizes at which training goes on beside the save."""
STEPS, ROWS, LENGTH = 8, 8, 64
"""Optimizer steps after a save, and rows of a rank in each."""
BLOCKING = "time that training waits, first / second"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """Of one size."""

    parameters: int
    seconds: dict[str, list[float]]
    """Variant -> time that training waits, the longest of the ranks, a value per round."""
    until_saved: list[float]
    """From the call of an asynchronous save until it counts."""
    bytes: dict[str, int]
    """Variant -> on disk."""


def make_config(encoder: dict[str, int], in_background: bool) -> RunConfig:
    """ZeRO stage 1 in bf16, the defaults."""
    return validate(
        {
            "name": "benchmark",
            "corpus": {"path": "none"},
            "model": encoder,
            "training": {"precision": "bf16", "sharding": "optimizer"},
            "checkpoint": {"async": in_background, "keep_last": 99},
        },
        "benchmark",
    )


def timed(call: Callable[[], object]) -> float:
    """Seconds that the slowest rank waits for `call`."""
    dist.barrier()
    began = time.perf_counter()
    call()
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def folder_bytes(folder: Path) -> int:
    """Of all files beneath it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Savers:
    """The three ways to save one engine."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.rank, self.step = dist.get_rank(), 0
        self.until_saved: list[float] = []
        self.bytes: dict[str, int] = {}
        streams = range(self.rank, 64, RANKS)
        model = engine.config.model.model_dump()
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(self.rank))
        labels = torch.where(torch.arange(LENGTH) % 5 == 0, ids, IGNORED)
        self.batch = Batch(ids, labels, torch.ones_like(ids), torch.arange(LENGTH).expand(ROWS, LENGTH))
        self.totals = agree_on_step(self.batch, 0, False)
        engine.set_learning_rate(1e-6)
        self.saver = CheckpointSaver(folder / "ours", engine, make_config(model, True).checkpoint, streams)

    def state(self) -> TrainingState:
        """Of the next step."""
        self.step += 1
        return TrainingState(self.step, 0, 0, StreamState.start(64), "")

    def synchronous(self) -> float:
        """Ours, on the training's own thread."""
        return self._ours("synchronous", at_once=True)

    def asynchronous(self) -> float:
        """Ours, in the background; what it does there is waited for after the measurement."""
        return self._ours("asynchronous", at_once=False)

    def _ours(self, name: str, *, at_once: bool) -> float:
        state = self.state()
        seconds = timed(lambda: self.saver.save(state, at_once=at_once))
        self.saver.wait()
        self.bytes[name] = folder_bytes(self.folder / "ours" / checkpoint_name(state.step))
        until_saved = self._clear(state)
        if not at_once:
            self.until_saved.append(until_saved)
        return seconds

    def _clear(self, state: TrainingState) -> float:
        (result,) = self.saver.finished()
        assert result.error is None, result.error
        dist.barrier()
        if self.rank == 0:
            remove_checkpoint(self.folder / "ours" / checkpoint_name(state.step))
        return result.seconds

    def steps_synchronous(self) -> float:
        """A save of ours and some steps after it."""
        return self._with_steps(at_once=True)

    def steps_asynchronous(self) -> float:
        """The same, with the save in the background of the steps."""
        return self._with_steps(at_once=False)

    def _with_steps(self, *, at_once: bool) -> float:
        state = self.state()

        def work() -> None:
            self.saver.save(state, at_once=at_once)
            for _ in range(STEPS):
                train_step(self.engine, self.batch, self.totals)
            self.saver.wait()

        seconds = timed(work)
        self._clear(state)
        return seconds

    def deepspeed(self) -> float:
        """DeepSpeed's `save_checkpoint`, as it comes."""
        seconds = timed(lambda: self.engine._deepspeed.save_checkpoint(str(self.folder / "theirs"), tag="step"))
        self.bytes["deepspeed"] = folder_bytes(self.folder / "theirs")
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.folder / "theirs")
        return seconds


def measure_rank(rank: int, size: int, rounds: int, folder: str) -> None:
    """One of the ranks; rank 0 writes what was measured."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(RANKS)
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(minutes=10), RANKS, rank)
    config = make_config(ENCODERS[size], True)
    engine = Engine(MaskedLanguageModel(config.model, VOCABULARY), config, RANKS, torch.device("cpu"))
    for values in engine.torch_optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            values[name].uniform_()
    savers = Savers(engine, Path(folder))
    variants = {"synchronous": savers.synchronous, "asynchronous": savers.asynchronous, "deepspeed": savers.deepspeed}
    if size in WITH_STEPS:
        variants |= {"synchronous+steps": savers.steps_synchronous, "asynchronous+steps": savers.steps_asynchronous}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            dist.barrier()
            os.sync()  # nobody writes what another has left
            took = variants[name]()
            if turn:  # the first is to warm up
                seconds[name].append(took)
    if rank == 0:
        parameters = sum(torch.Size(shape).numel() for shape in engine.parameter_shapes.values())
        measured = Measured(parameters, seconds, savers.until_saved[1:], savers.bytes)
        (Path(folder) / "measured.json").write_text(json.dumps(asdict(measured)))
    dist.barrier()
    end_rank(0)


def measure(size: int, rounds: int, parent: Path | None) -> Measured:
    """All variants at one size, in turn."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=parent))
    try:
        mp.spawn(measure_rank, (size, rounds, str(folder)), nprocs=RANKS)
        return Measured(**json.loads((folder / "measured.json").read_text()))
    finally:
        shutil.rmtree(folder)


def rows_of(measured: Measured) -> list[Row]:
    """The comparisons at one size."""
    name, reference = f"{measured.parameters / 1e6:,.0f} M parameters", "DeepSpeed's save_checkpoint"
    seconds, needed = measured.seconds, 12 * measured.parameters
    asynchronous = Row(name, "asynchronous save", reference, BLOCKING, "at most", 0.25)
    synchronous = Row(name, "synchronous save", reference, BLOCKING, "at most", 1.0)
    rows = [
        compare(asynchronous, seconds["asynchronous"], seconds["deepspeed"]),
        compare(synchronous, seconds["synchronous"], seconds["deepspeed"]),
        compare(
            Row(name, "asynchronous save, until it counts", reference, "time, first / second"),
            measured.until_saved,
            seconds["deepspeed"],
        ),
    ]
    if "asynchronous+steps" in seconds:
        planned = Row(name, "asynchronous", "synchronous", f"time of a save and {STEPS} steps, first / second")
        rows.append(compare(planned, seconds["asynchronous+steps"], seconds["synchronous+steps"]))
    for subject, target in (("asynchronous", 1.01), ("deepspeed", None)):
        ratio = measured.bytes[subject] / needed
        rows.append(
            Row(
                name,
                {"asynchronous": "checkpoint", "deepspeed": "DeepSpeed's checkpoint"}[subject],
                "fp32 weights and two moments",
                "bytes on disk, first / second",
                "at most" if target else None,
                target,
                measured.bytes[subject] / 1e6,
                needed / 1e6,
                "MB",
                ratio,
                ratio,
                ratio,
            )
        )
    return rows


def main() -> None:
    """Measure, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--rounds", type=int, default=5, help="of interleaved timing, after one to warm up (5)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the folder for temporary files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    on = machine()
    path = options.out / "checkpoint-cpu"
    rows = []
    for size in options.sizes:
        print(f"{size} M", flush=True)
        rows.extend(rows_of(measure(size, options.rounds, options.folder)))
    others = json.loads(path.with_suffix(".json").read_text())["rows"] if path.with_suffix(".json").is_file() else []
    known = {row.name for row in rows}
    rows += [Row(**{k: v for k, v in row.items() if k != "verdict"}) for row in others if row["name"] not in known]
    rows.sort(key=lambda row: float(row.name.split()[0]))
    write_results(path, "Saving, beside DeepSpeed", rows, on)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
