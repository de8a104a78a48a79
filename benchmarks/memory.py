"""Memory of a rank by `training.sharding`: `python -m benchmarks.memory` builds a model, takes two steps, and looks.

Every variant is a training engine as a run has it, on gloo ranks of this machine, each rank a process of its own; what
is compared is the highest resident memory of the rank that needed most, beyond what it held once everything was
imported. Beside it stand the highest while the model was built, and what `diptych plan` says.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.timing import Row, command, machine, write_results
from pretrain.config.load import validate
from pretrain.config.run import RunConfig
from pretrain.training.mock_step import mock_step
from pretrain.training.monitor.peak_memory import PeakMemory
from pretrain.training.ranks import end_rank
from pretrain.training.zero.construction import build_model, load_deepspeed
from pretrain.training.zero.engine import Engine

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 4096
MODELS = {
    15: {"hidden_size": 384, "num_layers": 8, "num_heads": 6},
    100: {"hidden_size": 768, "num_layers": 14, "num_heads": 12},
    500: {"hidden_size": 1280, "num_layers": 25, "num_heads": 20},
}
"""By millions of parameters, about."""
SHARDINGS = ("none", "optimizer", "gradients", "full")
LENGTH = 64


@dataclass(frozen=True)
class Peak:
    """Of one rank, in bytes."""

    parameters: int
    built: int
    """While the model was built and the engine made."""
    stepped: int
    """Over all, with a step of two micro-batches."""
    planned: int


def make_config(size: int, sharding: str, ranks: int) -> RunConfig:
    """A run of rows of 64, one at a time."""
    training = {"sharding": sharding, "precision": "fp32", "batch_size": 2 * ranks, "micro_batch_size": 1}
    return validate(
        {
            "name": "memory",
            "corpus": {"path": "/nowhere"},
            "data": {"sequence_length": LENGTH, "streams": ranks},
            "model": MODELS[size],
            "training": training,
            "checkpoint": {"async": False},
        },
        "benchmarks.memory",
    )


def measure_rank(rank: int, size: int, sharding: str, ranks: int, folder: str) -> None:
    """One of the ranks; writes its `Peak`."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(ranks)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(minutes=20), ranks, rank)
    config, device = make_config(size, sharding, ranks), torch.device("cpu")
    load_deepspeed(device)
    peak = PeakMemory(device)
    model = build_model(config, VOCABULARY, ranks, device)
    engine = Engine(model, config, ranks, device)
    parameters = sum(map(math.prod, engine.parameter_shapes.values()))
    built = peak.bytes()
    planned = mock_step(engine, config, VOCABULARY)
    stepped = peak.bytes()
    assert built is not None, "this system does not tell a process's peak of memory"
    assert stepped is not None
    (Path(folder) / f"{rank}.json").write_text(json.dumps(asdict(Peak(parameters, built, stepped, planned))))
    dist.barrier()
    end_rank(0)


def measure(size: int, sharding: str, ranks: int) -> Peak:
    """The rank that needed most."""
    folder = tempfile.mkdtemp(prefix="memory-benchmark-")
    try:
        mp.spawn(measure_rank, (size, sharding, ranks, folder), nprocs=ranks)
        peaks = [Peak(**json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(ranks)]
        return max(peaks, key=lambda peak: peak.stepped)
    finally:
        shutil.rmtree(folder)


def row(name: str, sharding: str, peak: Peak, ranks: int, reference: Peak, on: str, target: float | None) -> Row:
    """A variant beside `none`."""
    ratio = peak.stepped / reference.stepped
    return Row(
        name,
        f"{sharding}, {ranks} ranks (built: {peak.built / 2**20:,.0f}, plan: {peak.planned / 2**20:,.0f})",
        on,
        "highest memory of a rank, first / second",
        "at most" if target else None,
        target,
        peak.stepped / 2**20,
        reference.stepped / 2**20,
        "MiB",
        ratio,
        ratio,
        ratio,
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, choices=list(MODELS), default=500, help="millions of parameters (500)")
    parser.add_argument("--ranks", type=int, default=4, help="of the sharded variants (4)")
    parser.add_argument(
        "--shardings", nargs="+", choices=SHARDINGS[1:], default=SHARDINGS[1:], help="beside none (all); what fits"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    on, rows = machine(), []
    # Without sharding a rank holds as much whatever their number: one is enough, where four would not fit.
    reference = measure(options.size, "none", 1)
    name = f"{reference.parameters / 1e6:,.0f} M parameters"
    for sharding in (SHARDINGS[0], *options.shardings):
        ranks = 1 if sharding == "none" else options.ranks
        peak = reference if sharding == "none" else measure(options.size, sharding, ranks)
        target = 0.5 if sharding == "full" else None
        rows.append(row(name, sharding, peak, ranks, reference, "none, 1 rank", target))
        print(f"{sharding}: built {peak.built / 2**20:,.0f} MiB, stepped {peak.stepped / 2**20:,.0f} MiB", flush=True)
    write_results(options.out / f"memory-{options.size}m-cpu", "Memory of a rank by sharding", rows, on)
    print(command())


if __name__ == "__main__":
    main()
