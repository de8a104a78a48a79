"""Several corpora as one: shards are linked or copied as they are, their indexes and the manifest written anew."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKEN_COUNTS,
    TOKENIZER,
    Manifest,
    ShardEntry,
    SourceEntry,
    Split,
    SplitEntry,
    load_manifest,
    save_manifest,
    save_token_counts,
)
from pretrain.data.shards.shard import add_index, read_index, verify_shard
from pretrain.errors import UserError


def merge_corpora(corpus: Path, corpora: Sequence[Path], *, same_sources: bool = False) -> Manifest:
    """Make one corpus of several that share tokenizer and split rule; shards are hard links where possible.

    Equal documents fall into the same split in all of them, but are not removed. The corpus is made beside its place
    and moved there when it is whole, so what was interrupted is made anew.

    Args:
        corpus: folder to make.
        corpora: what to join.
        same_sources: they were built from parts of the same sources, in the same order; otherwise each has its own.

    Raises:
        UserError: other tokenizers, split rules or types of ids, a damaged shard, or a folder in use.
    """
    refuse_existing(corpus)
    manifests = [load_manifest(path) for path in corpora]
    rules = [m.split_rule for m in manifests]
    for what, values in (
        ("tokenizers", [m.tokenizer.sha256[:12] for m in manifests]),
        ("split rules", [f"{rule.hash} (valid {rule.valid}, test {rule.test})" for rule in rules]),
        ("types of ids", [m.token_dtype for m in manifests]),
    ):
        if len(set(values)) != 1:
            listed = "\n".join(f"  {path}: {value}" for path, value in zip(corpora, values, strict=True))
            raise UserError(f"corpora of different {what} cannot be merged:\n{listed}")
    counts = np.sum([np.load(path / TOKEN_COUNTS, allow_pickle=False) for path in corpora], axis=0)
    place = corpus.with_name(f".{corpus.name}.joining")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    splits = {split: _merge_split(place, corpora, manifests, split, same_sources) for split in SPLITS}
    shutil.copyfile(corpora[0] / TOKENIZER, place / TOKENIZER)
    lists = [manifest.sources for manifest in manifests]
    sources = [_sum(same) for same in zip(*lists, strict=True)] if same_sources else [s for some in lists for s in some]
    digest = save_token_counts(place, counts)
    update = {"sources": sources, "splits": splits, "token_counts_sha256": digest, "build_key": None}
    sealed = save_manifest(place, manifests[0].model_copy(update=update))
    place.replace(corpus)
    return sealed


def _sum(entries: Sequence[SourceEntry]) -> SourceEntry:
    """Return the entry of one source of which each corpus has read some files."""
    return SourceEntry(
        name=entries[0].name,
        files=sum(entry.files for entry in entries),
        documents=sum(entry.documents for entry in entries),
        characters=sum(entry.characters for entry in entries),
        skipped=dict(sum((Counter(entry.skipped) for entry in entries), Counter[str]())),
    )


def _merge_split(
    place: Path, corpora: Sequence[Path], manifests: Sequence[Manifest], split: Split, same_sources: bool
) -> SplitEntry:
    merged = [manifest.splits[split] for manifest in manifests]
    shards: list[ShardEntry] = []
    first_source = 0
    for path, manifest in zip(corpora, manifests, strict=True):
        for entry in manifest.splits[split].shards:
            if problem := verify_shard(path, entry):
                raise UserError(f"{problem}; run `diptych data verify {path}`")
            index = read_index(path / entry.index_path)
            index[:, 2] += first_source
            relative = f"{split}/shard-{len(shards):06d}.tar"
            (place / split).mkdir(exist_ok=True)
            _link((path / entry.path).resolve(), place / relative)
            shards.append(add_index(place, relative, index))
        first_source += 0 if same_sources else len(manifest.sources)
    histogram = sum((Counter(entry.length_histogram) for entry in merged), Counter[int]())
    return SplitEntry(
        documents=sum(entry.documents for entry in merged),
        characters=sum(entry.characters for entry in merged),
        tokens=sum(entry.tokens for entry in merged),
        length_histogram=dict(sorted(histogram.items())),
        shards=shards,
    )


def refuse_existing(corpus: Path) -> None:
    """Refuse to make a corpus where something is.

    Raises:
        UserError: the folder is not empty.
    """
    if corpus.is_dir() and any(corpus.iterdir()):
        state = "is a corpus already" if (corpus / MANIFEST).is_file() else "is not empty"
        raise UserError(f"{corpus} {state}; name a new folder, or delete this one")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
