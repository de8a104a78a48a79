"""Decisions of a build before anything is encoded: each document's split and its place in the shards.

They are a pure function of the documents and the config. A scan holds a few numbers per document and no text.
"""

import hashlib
import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.config.data import CorpusConfig, SplitsConfig
from pretrain.data.build.filters import Sieve
from pretrain.data.manifest import SPLITS, SourceEntry, Split
from pretrain.data.sources.documents import Document, InputFile
from pretrain.data.sources.inputs import source_name
from pretrain.data.sources.reading import read_documents
from pretrain.errors import UserError

BuildProgress = Callable[[str, int, int, int], None]
"""Function to call with a stage, the bytes of text done, those in all (0 while not known), and the documents done."""
REMOVED = 255
"""Index in place of a split's where the document is left out."""
_REPORT_EVERY_BYTES = 2**20
_OVERHEAD_BYTES = 2560
"""Bytes that a document takes in a shard beside its ids, at most: two tar headers, the .npy header, the .json member
and their padding."""


@dataclass(frozen=True)
class Scan:
    """Numbers about all documents in reading order; every array is [documents]."""

    splits: npt.NDArray[np.uint8]
    """Index into SPLITS, or REMOVED."""
    hashes: npt.NDArray[np.uint64]
    characters: npt.NDArray[np.int64]
    utf8_bytes: npt.NDArray[np.int64]
    sources: list[SourceEntry]

    @property
    def bytes_per_character(self) -> float:
        """UTF-8 bytes per character of what is kept."""
        kept = self.splits != REMOVED
        return float(self.utf8_bytes[kept].sum() / max(1, self.characters[kept].sum()))

    @property
    def total_bytes(self) -> int:
        """UTF-8 bytes of what is kept, over all splits."""
        return int(self.utf8_bytes[self.splits != REMOVED].sum())

    def count(self, split: Split) -> int:
        """Number of documents in a split."""
        return int(np.count_nonzero(self.splits == SPLITS.index(split)))


def text_hash(text: str) -> int:
    """Return blake2b-64 of the text after NFKC, each run of white space as one space, and none at the ends."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "big")


def split_of(text_hash: int, rule: SplitsConfig) -> Split:
    """Return the split of every document with this hash; equal texts never fall into two splits."""
    fraction = text_hash / 2**64
    if fraction < rule.test:
        return "test"
    return "valid" if fraction < rule.test + rule.valid else "train"


def held_out_first(config: CorpusConfig) -> CorpusConfig:
    """Return the config with sources given to test and valid in front, and nothing split off by hash beside them.

    So whatever is held out has been seen when an equal document comes that would go elsewhere.
    """
    ranks = {"test": 0, "valid": 1, None: 2, "train": 3}
    sources = sorted(config.sources, key=lambda source: ranks[source.split])
    none_by_hash = {split: 0.0 for split in ("valid", "test") if any(source.split == split for source in sources)}
    splits = config.splits.model_copy(update=none_by_hash)
    return config.model_copy(update={"sources": sources, "splits": splits})


def all_documents(
    config: CorpusConfig, inputs: Sequence[Sequence[InputFile]], skipped: Sequence[Counter[str]] | None = None
) -> Iterator[Document]:
    """Yield the documents of all sources, in order; `skipped` has a counter per source."""
    counters = skipped or [Counter() for _ in config.sources]
    residues_only = config.tokenizer.kind == "protein"
    for source, files, counter in zip(config.sources, inputs, counters, strict=True):
        yield from read_documents(source, files, config.on_bad, counter, residues_only)


def scan(config: CorpusConfig, inputs: Sequence[Sequence[InputFile]], report: BuildProgress) -> Scan:
    """Read everything once, and keep a few numbers per document; `config` is from `held_out_first`.

    Raises:
        UserError: a bad record under `on_bad: error`, no document at all, or fewer than splits and streams need.
    """
    splits, hashes, characters, utf8_bytes = bytearray(), array("Q"), array("q"), array("q")
    sources: list[SourceEntry] = []
    sieve = Sieve(config)
    done = reported = 0
    for source, files in zip(config.sources, inputs, strict=True):
        skipped, kept = Counter[str](), Counter[str]()
        one_source = config.model_copy(update={"sources": [source]})
        for document in all_documents(one_source, [files], [skipped]):
            digest = text_hash(document.text)
            split = source.split or split_of(digest, config.splits)
            reason = sieve.reason_to_remove(document.text, digest, split)
            if reason:
                skipped[reason] += 1
            else:
                kept += Counter(documents=1, characters=len(document.text))
            splits.append(REMOVED if reason else SPLITS.index(split))
            hashes.append(digest)
            characters.append(len(document.text))
            utf8_bytes.append(len(document.text.encode()))
            done += utf8_bytes[-1]
            if done - reported >= _REPORT_EVERY_BYTES:
                reported = done
                report("reading", done, 0, len(splits))
        counts = {"documents": kept["documents"], "characters": kept["characters"]}
        skipped_by_reason = dict(sorted(skipped.items()))
        sources.append(SourceEntry(name=source_name(source), files=len(files), skipped=skipped_by_reason, **counts))
    report("reading", done, done, len(splits))
    result = Scan(
        np.frombuffer(bytes(splits), np.uint8), np.array(hashes), np.array(characters), np.array(utf8_bytes), sources
    )
    check_large_enough(config, result)
    return result


def check_large_enough(config: CorpusConfig, found: Scan) -> None:
    """Refuse a corpus that leaves a split or a stream without a document.

    Raises:
        UserError: with the number of documents and settings that would work.
    """
    documents = int((found.splits != REMOVED).sum())
    if not documents:
        skipped = sum((Counter(source.skipped) for source in found.sources), Counter[str]())
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in skipped.items()) or "none was skipped"
        raise UserError(
            f"no document in the {sum(s.files for s in found.sources):,} files of corpus.sources (bad records: "
            f"{reasons}); look at the files, at text_field, separator and format of the sources, and at corpus.filters"
        )
    more = "add documents, cut text into more of them with corpus.sources[].separator"
    held_out: tuple[Split, ...] = ("valid", "test")
    for split in held_out:
        share = getattr(config.splits, split)
        if any(source.split == split for source in config.sources) and not found.count(split):
            raise UserError(
                f"no document of the sources given to {split} is left: filters removed them, or they are in test too"
            )
        if share > 0 and not found.count(split):
            raise UserError(
                f"corpus too small: of its {documents:,} documents none fell into {split} with corpus.splits.{split} = "
                f"{share:g}; {more}, or set corpus.splits.{split}={_larger_share(share)} or 0"
            )
    train, needed = found.count("train"), config.min_train_shards
    if train < needed:
        works = f"data.streams and corpus.min_train_shards to at most {train}" if train else "smaller corpus.splits"
        raise UserError(
            f"corpus too small for its streams: {train:,} training documents cannot fill corpus.min_train_shards = "
            f"{needed} shards, one for each of data.streams; {more}, or set {works}"
        )


def _larger_share(share: float) -> str:
    return f"{min(0.4, max(0.2, 2 * share)):g}"


def sampled_characters(found: Scan, limit: int) -> dict[int, int]:
    """Return document -> how many of its characters to train the tokenizer on, taken in the order of their hashes."""
    train = np.flatnonzero(found.splits == SPLITS.index("train"))
    in_order = train[np.argsort(found.hashes[train], kind="stable")]
    before = np.cumsum(found.characters[in_order]) - found.characters[in_order]
    taken = np.minimum(found.characters[in_order], limit - before)
    return {int(d): int(n) for d, n in zip(in_order, taken, strict=True) if n > 0}


def plan_groups(found: Scan, config: CorpusConfig, bytes_per_byte: float) -> dict[Split, list[int]]:
    """Cut each split into groups of consecutive documents, one worker's task and usually one shard each.

    Args:
        found: the documents.
        config: `shard_bytes` and `min_train_shards`.
        bytes_per_byte: stored bytes per byte of UTF-8 text; an estimate, better too high than too low.

    Returns:
        The number of documents in each group, in order.
    """
    stored = np.ceil(found.utf8_bytes * bytes_per_byte).astype(np.int64) + _OVERHEAD_BYTES
    at_least = {"train": config.min_train_shards, "valid": 1, "test": 1}
    return {
        split: cut_evenly(stored[found.splits == SPLITS.index(split)], config.shard_bytes, at_least[split])
        for split in SPLITS
    }


def cut_evenly(sizes: npt.NDArray[np.int64], limit: int, at_least: int) -> list[int]:
    """Cut a sequence into runs of about equal size, each of at most `limit` unless it is a single item.

    Returns:
        The number of items in each run: `at_least` runs or more, as long as there are as many items.
    """
    left = int(sizes.sum())
    planned = max(at_least, math.ceil(left / limit))
    runs: list[int] = []
    quota, filled = 0.0, 0
    for position, size in enumerate(map(int, sizes)):
        needed_for_rest = at_least - len(runs)
        full = filled + size > limit or filled + size / 2 > quota
        if not runs or full or len(sizes) - position <= needed_for_rest:
            quota = left / max(1, planned - len(runs))
            runs.append(0)
            filled = 0
        runs[-1] += 1
        filled += size
        left -= size
    return runs
