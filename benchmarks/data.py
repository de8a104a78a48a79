"""Reading rows, resuming, memory and building, beside plain webdataset and sentencepiece: `python -m benchmarks.data`.

Needs the books and the proteins (`DIPTYCH_DATA`). Corpora are built below `--folder` and kept there. Writes
results/data-cpu .json and .md; with `--only building` only a part, beside what is there of the others.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import webdataset as wds

from benchmarks.timing import command, machine
from launch.quickstart.documentation import collect_documentation
from pretrain.config.load import load_config
from pretrain.config.parallel import SOLE_READER
from pretrain.config.run import RunConfig
from pretrain.data.build.corpus import build_corpus
from pretrain.data.manifest import Manifest
from pretrain.data.stream.loader import StepRows, training_steps
from pretrain.data.stream.state import StreamState
from pretrain.files import write_json, write_text
from pretrain.run.attempt import agree_on_attempt
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from pretrain.training import trainer
from pretrain.training.monitor.monitor import Monitor
from pretrain.training.ranks import Ranks, StopRequest

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("DIPTYCH_DATA", ROOT.parent / "shared/data"))
RESULTS = ROOT / "benchmarks/results/data-cpu"
MANY_SHARDS = 2000
PASSES = 3
"""Over a corpus, for each measurement: the books alone are read in a fifth of a second."""
TRAINED_TOKENS = 500_000
WARM_UP_STEPS = 20


def corpus_config(name: str, folder: Path, *overrides: str) -> RunConfig:
    """A packaged corpus of the real data, below `folder`, whose every opening hashes the shard.

    A cache that cannot be written remembers nothing.
    """
    os.environ["DIPTYCH_DATA"] = str(REAL_DATA)
    fixed = [f"corpus.path={folder / name}", "data.cache=/dev/null", "data.workers=0"]
    return load_config(str(ROOT / f"configs/data/{name}.yaml"), [*fixed, *overrides])


def timed(action: Callable[[], int]) -> float:
    """What `action` counts, per second of this process on a core; what others do on the machine does not matter."""
    began = time.process_time()
    count = action()
    return count / (time.process_time() - began)


def taking_turns(ours: Callable[[], int], theirs: Callable[[], int], repeats: int) -> dict[str, float]:
    """Medians of what each counts per second, and median and range of the ratios within a round."""
    rounds = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    ratios = [first / second for first, second in rounds]
    names = ("diptych", "reference")
    medians = {name: statistics.median(values) for name, values in zip(names, zip(*rounds, strict=True), strict=True)}
    return {**medians, "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def decoded_tokens(config: RunConfig, manifest: Manifest) -> int:
    """Plain webdataset over the training tars: tokens of every decoded document."""
    urls = [str(config.corpus.path / shard.path) for shard in manifest.splits["train"].shards]
    return sum(
        len(sample["npy"]) for _ in range(PASSES) for sample in wds.WebDataset(urls, shardshuffle=False).decode()
    )


def stream_tokens(config: RunConfig, manifest: Manifest, epoch_tokens: int) -> int:
    """Our stream over as many tokens: shards hashed at every opening, rows packed, masked and batched."""
    tokens = 0
    for step in training_steps(config, manifest, StreamState.start(config.data.streams), SOLE_READER):
        tokens += int(np.count_nonzero(step.batch.document_ids.numpy()))
        if tokens >= epoch_tokens:
            return tokens
    raise AssertionError("the stream ended")


def compare_reading(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of one core."""
    rows = []
    for name, length in (("books", 128), ("books", 512), ("proteins", 256), ("proteins", 1024)):
        config = corpus_config(name, folder, f"data.sequence_length={length}", "data.packing=packed")
        manifest = build_corpus(config.corpus)
        tokens = PASSES * manifest.splits["train"].tokens
        result = taking_turns(
            lambda c=config, m=manifest, t=tokens: stream_tokens(c, m, t),
            lambda c=config, m=manifest: decoded_tokens(c, m),
            repeats,
        )
        documents = manifest.splits["train"].documents
        row = {"corpus": name, "sequence_length": length, "tokens_per_document": round(tokens / PASSES / documents)}
        rows.append({**row, **result})
        print(rows[-1], flush=True)
    return rows


def measure_resume(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds to the first batch at the beginning, and after 1, 50 and 99 % of an epoch of 2,000 shards."""
    source = folder / "many.jsonl"
    random = np.random.default_rng(0)
    with source.open("w") as file:
        for number in range(20 * MANY_SHARDS):
            words = random.integers(0, 5000, random.integers(20, 400))
            file.write(json.dumps({"id": number, "text": " ".join(f"w{word}" for word in words)}) + "\n")
    values = [f"corpus.sources=[{{path: {source}}}]", f"corpus.min_train_shards={MANY_SHARDS}"]
    values += ["corpus.splits.valid=0.001", "corpus.splits.test=0", "data.streams=64", "data.sequence_length=512"]
    values += ["data.packing=packed", f"corpus.path={folder / 'many'}", "training.batch_size=64"]
    values += ["corpus.tokenizer.sample_characters=2000000", "corpus.tokenizer.vocab_size=2000"]
    config = corpus_config("books", folder, *values)
    manifest = build_corpus(config.corpus)
    shards = manifest.splits["train"].shards
    visits_each = len(shards) // 64
    seconds: dict[str, list[float]] = {}
    for share in (0.0, 0.01, 0.5, 0.99) * repeats:
        state = StreamState.start(64)
        state.visits[:] = int(share * visits_each)
        state.rows[:, 0] = 3
        began = time.perf_counter()
        next(training_steps(config, manifest, StreamState.from_json(state.to_json()), SOLE_READER))
        seconds.setdefault(f"{share:.0%}", []).append(time.perf_counter() - began)
    longest = {share: max(values) for share, values in seconds.items()}
    return {"shards": len(shards), "tokens": manifest.splits["train"].tokens, "longest_s": longest}


def measure_memory(folder: Path) -> dict[str, float]:
    """What a loader worker holds that no other process does, MiB, while it reads on; shards that it maps included."""
    config = corpus_config("proteins", folder, "data.packing=packed", "data.sequence_length=512", "data.workers=1")
    steps = training_steps(config, build_corpus(config.corpus), StreamState.start(64), SOLE_READER)
    held = {}
    for count in (100, 400, 1600):
        for _ in islice(steps, count - max(held, default=0)):
            pass
        (worker,) = multiprocessing.active_children()
        private = re.findall(r"^Private_\w+:\s+(\d+) kB$", Path(f"/proc/{worker.pid}/smaps_rollup").read_text(), re.M)
        held[count] = sum(map(int, private)) / 1024
    return {f"after {count} steps": mib for count, mib in held.items()}


def compare_building(folder: Path, repeats: int) -> dict[str, float]:
    """MB of text per second: one process from gzip to manifest, tokenizer given, beside `encode` of the same text."""
    build_corpus(corpus_config("books", folder).corpus)
    model = folder / "books" / "tokenizer.model"
    texts = [gzip.decompress(path.read_bytes()).decode() for path in sorted((REAL_DATA / "books").glob("*.gz"))]
    processor = spm.SentencePieceProcessor(model_proto=model.read_bytes())
    size = sum(len(text.encode()) for text in texts)

    def build() -> int:
        shutil.rmtree(folder / "again", ignore_errors=True)
        values = [f"corpus.path={folder / 'again'}", f"corpus.tokenizer.model={model}", "corpus.processes=1"]
        build_corpus(corpus_config("books", folder, *values).corpus)
        return size

    def encode() -> int:
        for text in texts:
            for line in text.split("\n\n"):
                processor.encode(line)
        return size

    result = taking_turns(build, encode, repeats)
    return {**result, "diptych": result["diptych"] / 1e6, "reference": result["reference"] / 1e6}


def measure_loader_share(folder: Path) -> dict[str, float]:
    """Of a quickstart run's steps with one worker, the share of the wall time in which training waits for rows."""
    documents = folder / "quickstart.jsonl.gz"
    collect_documentation(documents, lambda *_: None)
    with tempfile.TemporaryDirectory() as runs:
        values = [f"corpus.path={folder / 'quickstart'}", f"corpus.sources=[{{path: {documents}}}]", f"runs={runs}"]
        values += [f"training.tokens={TRAINED_TOKENS}", "data.workers=1", "training.validate_every=100000"]
        values += ["checkpoint.every=100000", f"data.cache={runs}/cache"]
        config = load_config("quickstart", values)
        open_run_folder(config, build_corpus(config.corpus))
        os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("gloo", init_method=f"file://{runs}/meet", rank=0, world_size=1)
        waits: list[float] = []

        def waited_for(*arguments: Any) -> Iterator[StepRows]:
            steps = training_steps(*arguments)
            while True:
                began = time.perf_counter()
                step = next(steps)
                waits.append(time.perf_counter() - began)
                yield step

        trainer.training_steps = waited_for
        ranks, folder = Ranks(0, 1, torch.device("cpu")), RunFolder.of(config)
        monitor = Monitor(config, agree_on_attempt(folder), ranks, StopRequest())
        trainer.Trainer(config, ranks, monitor).fit()
        records = [record for record in folder.metrics() if "loss" in record]
        dist.destroy_process_group()
    # The mock step before the first asks for no rows; the first steps wait for the worker to start.
    seconds = sum(record["seconds"] for record in records[WARM_UP_STEPS:])
    return {
        "steps": len(records) - WARM_UP_STEPS,
        "seconds_per_step": seconds / (len(records) - WARM_UP_STEPS),
        "share": sum(waits[WARM_UP_STEPS : len(records)]) / seconds,
    }


def verdict(met: bool) -> str:
    """In the words of the other benchmarks."""
    return "met" if met else "not met"


def markdown(parts: dict[str, Any]) -> Iterator[str]:
    """The page beside the numbers."""
    yield "# Data on a CPU\n"
    for name, part in parts.items():
        on = part["machine"]
        versions = ", ".join(f"{package} {number}" for package, number in part["versions"].items())
        yield (
            f"{name}: `{part['command']}`, {on['date']}, {on['cores']} cores ({on['cpu']}), {on['threads']} threads, "
            f"load average before: {on['load_average_before']}; {versions}.\n"
        )
    if reading := parts.get("reading"):
        yield "## Tokens per second of one core\n"
        yield "Diptych: shards hashed at every opening, rows packed, masked and batched; webdataset: "
        yield "`WebDataset(...).decode()` of the same tars. By CPU time, in turn. Target: at least 1.\n"
        yield "| corpus | tokens a document | row | Diptych | webdataset | ratio | lowest to highest | verdict |"
        yield "|---|---|---|---|---|---|---|---|"
        for row in reading["result"]:
            yield (
                f"| {row['corpus']} | {row['tokens_per_document']:,} | {row['sequence_length']} | "
                f"{row['diptych']:,.0f} | {row['reference']:,.0f} | **{row['ratio']:.2f}** | {row['lowest']:.2f} to "
                f"{row['highest']:.2f} | {verdict(row['ratio'] >= 1)} |"
            )
    if resume := parts.get("resume"):
        yield f"\n## First batch after a resume, {resume['result']['shards']:,} shards\n"
        yield "All 64 open shards hashed; the longest of the repeats. Target: under 2 s at any position.\n"
        yield "| position in the epoch | seconds | verdict |\n|---|---|---|"
        for share, seconds in resume["result"]["longest_s"].items():
            yield f"| {share} | {seconds:.2f} | {verdict(seconds < 2)} |"
    if memory := parts.get("memory"):
        yield "\n## Memory of a loader worker\n"
        held = ", ".join(f"{mib:.0f} MiB {when}" for when, mib in memory["result"].items())
        yield f"Of 64 streams of proteins, what no other process shares, mapped shards included: {held}."
    if building := parts.get("building"):
        row = building["result"]
        yield "\n## Building\n"
        yield f"One process, from gzip to the manifest: {row['diptych']:.1f} MB/s of text; `sentencepiece` encode: "
        yield f"{row['reference']:.1f} MB/s. Ratio: {row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})."
    if loader := parts.get("loader"):
        row = loader["result"]
        yield "\n## The loader's share of a step\n"
        yield f"Quickstart, one rank, one worker, {row['steps']} steps of {row['seconds_per_step']:.2f} s: training "
        yield f"waits for rows in **{row['share']:.2%}** of it. Target: under 3 %; {verdict(row['share'] < 0.03)}."


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["reading", "resume", "memory", "building", "loader"])
    parser.add_argument("--folder", type=Path, default=Path("corpora/benchmark"))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    measures: dict[str, Callable[[], Any]] = {
        "memory": lambda: measure_memory(folder),
        "reading": lambda: compare_reading(folder, given.repeats),
        "resume": lambda: measure_resume(folder, given.repeats),
        "building": lambda: compare_building(folder, min(given.repeats, 3)),
        "loader": lambda: measure_loader_share(folder),
    }
    saved = RESULTS.with_suffix(".json")
    parts = json.loads(saved.read_text())["parts"] if given.only and saved.is_file() else {}
    packages = ("numpy", "webdataset", "sentencepiece")
    for name in given.only or measures:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if name == "loader" else 1)
        on = machine()
        result = measures[name]()
        print(name, result, flush=True)
        versions = {"python": on["python"], "torch": on["torch"], **{package: version(package) for package in packages}}
        parts[name] = {"command": command(), "machine": on, "versions": versions, "result": result}
        write_json(saved, {"format": 1, "parts": parts})
        write_text(RESULTS.with_suffix(".md"), "\n".join(markdown(parts)) + "\n")


if __name__ == "__main__":
    main()
