"""A finished corpus: whether every byte is what the manifest says, and what `diptych data show` prints."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.manifest import SPLITS, TOKEN_COUNTS, TOKENIZER, Manifest, load_manifest
from pretrain.data.shards.shard import Shard, verify_shard
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.files import sha256_of


def verify_corpus(path: Path, processes: int = 0) -> list[str]:
    """Compare every byte of a corpus with its manifest.

    Args:
        path: the corpus folder.
        processes: files read at the same time; 0 means one per core.

    Returns:
        What is wrong, one line each; empty if all is well.
    """
    try:
        manifest = load_manifest(path)
    except UserError as error:
        return [str(error)]
    problems = []
    counts = path / TOKEN_COUNTS
    if not counts.is_file():
        problems.append(f"{counts} is missing")
    elif sha256_of(counts) != manifest.token_counts_sha256:
        problems.append(f"{counts} is damaged: its sha256 is not the manifest's")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        problems += [problem for problem in pool.map(lambda shard: verify_shard(path, shard), shards) if problem]
    kept = manifest.shard_files
    found = sorted(file for split in SPLITS for file in (path / split).glob("*") if file.is_file())
    return problems + [f"{f} is not in the manifest" for f in found if f"{f.parent.name}/{f.name}" not in kept]


@dataclass(frozen=True)
class CorpusDescription:
    """What `diptych data show` prints."""

    path: Path
    manifest: Manifest
    """Sources, splits, length histograms, vocabulary size and fingerprint."""
    characters_per_token: float
    """Mean over all splits."""
    unigram_entropy: float
    """Entropy of the training split's token frequencies, in nats: the loss of a model that knows nothing else."""
    examples: list[str]
    """How a few training documents begin, decoded."""


def describe_corpus(path: Path, examples: int = 3, characters: int = 200) -> CorpusDescription:
    """Read a corpus's manifest, its token counts and the beginnings of some training documents.

    Raises:
        UserError: there is no finished corpus, or a file of it is damaged.
    """
    manifest = load_manifest(path)
    if not (path / TOKEN_COUNTS).is_file():
        raise UserError(f"{path / TOKEN_COUNTS} is missing; restore it, or build the corpus again")
    counts = np.load(path / TOKEN_COUNTS, allow_pickle=False)
    frequencies = counts[counts > 0] / counts.sum()
    tokenizer = Tokenizer(path / TOKENIZER)
    shown = []
    for entry in manifest.splits["train"].shards[:examples]:
        shard = Shard(path, entry, manifest.token_dtype)
        ids = shard.tokens(0, 0, min(characters, int(shard.lengths[0])))
        shown.append(tokenizer.decode(ids)[:characters])
    splits = manifest.splits.values()
    return CorpusDescription(
        path=path,
        manifest=manifest,
        characters_per_token=sum(s.characters for s in splits) / max(1, sum(s.tokens for s in splits)),
        unigram_entropy=float(-(frequencies * np.log(frequencies)).sum()),
        examples=shown,
    )
