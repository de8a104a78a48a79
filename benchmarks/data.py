"""How fast corpora are built and rows are made, beside plain webdataset and sentencepiece on the same bytes.

    DIPTYCH_DATA=... python benchmarks/data.py --date YYYY-MM-DD [--folder FOLDER] [--repeats 5]

One process on one core; the two sides of a comparison take turns, and medians are compared. Results go to
benchmarks/results/data-cpu.json and .md.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
import webdataset as wds

from pretrain.config import RunConfig, load_config
from pretrain.data.corpus import build_corpus
from pretrain.data.loader import training_steps
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.data.stream import StreamState

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("DIPTYCH_DATA", ROOT.parent / "shared/data"))
RESULTS = ROOT / "benchmarks/results"
MANY_SHARDS = 2000
PASSES = 3
"""Over a corpus, for each measurement: the books alone are read in a fifth of a second."""


def corpus_config(name: str, folder: Path, *overrides: str) -> RunConfig:
    """A packaged corpus of the real data, below `folder`."""
    os.environ["DIPTYCH_DATA"] = str(REAL_DATA)
    fixed = [f"corpus.path={folder / name}", f"data.cache={folder / 'cache'}", "data.workers=0"]
    return load_config(str(ROOT / f"configs/data/{name}.yaml"), [*fixed, *overrides])


def timed(action: Callable[[], int]) -> float:
    """What `action` counts, per second of this process on a core; what others do on the machine does not matter."""
    began = time.process_time()
    count = action()
    return count / (time.process_time() - began)


def decoded_tokens(config: RunConfig, manifest: Manifest) -> int:
    """Plain webdataset over the training tars: tokens of every decoded document."""
    urls = [str(config.corpus.path / shard.path) for shard in manifest.splits["train"].shards]
    return sum(
        len(sample["npy"]) for _ in range(PASSES) for sample in wds.WebDataset(urls, shardshuffle=False).decode()
    )


def stream_tokens(config: RunConfig, manifest: Manifest, epoch_tokens: int) -> int:
    """Our stream over as many tokens: shards hashed at every opening, rows packed, masked and batched."""
    tokens = 0
    for step in training_steps(config, manifest, StreamState.start(config.data.streams), 0, 1):
        tokens += int(np.count_nonzero(step.batch.document_ids.numpy()))
        if tokens >= epoch_tokens:
            return tokens
    raise AssertionError("the stream ended")


def compare_reading(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of one core, interleaved."""
    rows = []
    for name, length in (("books", 128), ("books", 512), ("proteins", 256), ("proteins", 1024)):
        # A cache that cannot be written remembers nothing, so every opening hashes its shard.
        values = [f"data.sequence_length={length}", "data.packing=packed", "data.cache=/dev/null"]
        config = corpus_config(name, folder, *values)
        manifest = load_manifest(config.corpus.path)
        tokens = PASSES * manifest.splits["train"].tokens
        ours, theirs = [], []
        for _ in range(repeats):
            theirs.append(timed(lambda c=config, m=manifest: decoded_tokens(c, m)))
            ours.append(timed(lambda c=config, m=manifest, t=tokens: stream_tokens(c, m, t)))
        pair = statistics.median(ours), statistics.median(theirs)
        documents = manifest.splits["train"].documents
        row = {"corpus": name, "sequence_length": length, "tokens_per_document": round(tokens / PASSES / documents)}
        rows.append({**row, "diptych": pair[0], "webdataset": pair[1], "ratio": pair[0] / pair[1]})
        print(rows[-1], flush=True)
    return rows


def measure_resume(folder: Path) -> dict[str, Any]:
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
    seconds = {}
    for share in (0.0, 0.01, 0.5, 0.99):
        state = StreamState.start(64)
        state.visits[:] = int(share * visits_each)
        state.rows[:, 0] = 3
        began = time.perf_counter()
        next(training_steps(config, manifest, StreamState.from_json(state.to_json()), 0, 1))
        seconds[f"{share:.0%}"] = time.perf_counter() - began
    print(seconds, flush=True)
    return {"shards": len(shards), "tokens": manifest.splits["train"].tokens, "first_batch_s": seconds}


def measure_memory(folder: Path) -> dict[str, float]:
    """Peak resident memory of a process after reading 200 steps, and how much of it came while reading, MiB."""
    config = corpus_config("proteins", folder, "data.packing=packed", "data.sequence_length=512")
    manifest = load_manifest(config.corpus.path)
    steps = training_steps(config, manifest, StreamState.start(64), 0, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in islice(steps, 200):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mib": after, "added_by_reading_mib": after - before}


def compare_building(folder: Path, repeats: int) -> dict[str, float]:
    """MB of text per second: one process from gzip to manifest, tokenizer given, beside `encode` of the same text."""
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

    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(timed(encode) / 1e6)
        ours.append(timed(build) / 1e6)
    return {"diptych_mb_per_s": statistics.median(ours), "sentencepiece_mb_per_s": statistics.median(theirs)}


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """The page beside the numbers."""
    yield f"# Data on a CPU, {result['date']}\n"
    yield f"`{result['command']}`, one core of {result['machine']['cores']} ({result['machine']['processor']}); "
    yield ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + ".\n"
    yield "## Tokens per second of one core\n"
    yield "Diptych: shards hashed, rows packed, masked and batched; webdataset: `WebDataset(...).decode()`."
    yield "By CPU time.\n"
    yield "| corpus | tokens a document | row | Diptych | webdataset | ratio |\n|---|---|---|---|---|---|"
    for row in result["reading"]:
        yield (
            f"| {row['corpus']} | {row['tokens_per_document']:,} | {row['sequence_length']} | {row['diptych']:,.0f} | "
            f"{row['webdataset']:,.0f} | {row['ratio']:.2f} |"
        )
    resume = result["resume"]
    yield f"\n## First batch after a resume, {resume['shards']:,} shards\n"
    yield "| position in the epoch | seconds |\n|---|---|"
    for share, seconds in resume["first_batch_s"].items():
        yield f"| {share} | {seconds:.2f} |"
    yield "\n## Memory and building\n"
    memory, build = result["memory"], result["building"]
    yield f"A reader of 64 streams: {memory['peak_mib']:.0f} MiB at its peak, with torch in it; "
    yield f"{memory['added_by_reading_mib']:.0f} MiB of that came with reading 200 steps.\n"
    yield f"Build, one process, from gzip to the manifest: {build['diptych_mb_per_s']:.1f} MB/s of text; "
    yield f"`sentencepiece` encode alone: {build['sentencepiece_mb_per_s']:.1f} MB/s."


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--date", required=True)
    parser.add_argument("--folder", type=Path, default=Path("corpora/benchmark"))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in ("books", "proteins"):
        build_corpus(corpus_config(name, folder).corpus)
    result = {
        "date": given.date,
        "command": f"python benchmarks/data.py --date {given.date} --repeats {given.repeats}",
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "webdataset", "sentencepiece")},
        },
        "memory": measure_memory(folder),
        "reading": compare_reading(folder, given.repeats),
        "resume": measure_resume(folder),
        "building": compare_building(folder, min(given.repeats, 3)),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "data-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "data-cpu.md").write_text("\n".join(markdown(result)) + "\n")
    print((RESULTS / "data-cpu.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
