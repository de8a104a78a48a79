"""One group of documents -> its shards, in a worker process, and the record that lets a killed build go on.

A group is built whole by one worker, so no byte depends on how many there are.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from pretrain.data.build.plan import REMOVED, Scan
from pretrain.data.manifest import SPLITS, TOKENIZER, ShardEntry, Split, length_histogram
from pretrain.data.shards.shard import EncodedDocument, write_shard
from pretrain.data.sources.documents import Document
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.files import write_text

RAW_FILES_CHANGED = (
    "the raw files changed while the corpus was being built; run the same command again when they are at rest"
)
_TAR_BLOCK, _TAR_RECORD = 512, 10_240
"""Bytes to a multiple of which tar pads members, and the whole file."""
_NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class ShardGroup:
    """Consecutive documents of one split: one worker's task."""

    split: Split
    number: int

    @property
    def name(self) -> str:
        """Path of its first shard, relative to the corpus and without .tar."""
        return f"{self.split}/shard-{self.number:06d}"

    def record_path(self, records: Path) -> Path:
        """Return the file that says that the group is finished."""
        return records / f"{self.split}-{self.number:06d}.json"


class GroupRecord(BaseModel):
    """What a finished group adds to the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    characters: int
    shards: list[ShardEntry]
    length_histogram: dict[int, int]
    token_counts: list[int]
    """How often each id occurs, [vocab_size]."""

    @property
    def documents(self) -> int:
        """Number of documents in the group."""
        return sum(self.length_histogram.values())


@dataclass(frozen=True)
class Workplace:
    """Folders and settings that all workers share."""

    corpus: Path
    records: Path
    """Folder of the records of finished groups."""
    tokenizer_sha256: str
    shard_bytes: int
    sources: tuple[str, ...]
    """Names, as the index numbers them."""


def deal_to_groups(
    documents: Iterator[Document], found: Scan, groups: dict[Split, list[int]], missing: set[ShardGroup]
) -> Iterator[tuple[ShardGroup, list[Document]]]:
    """Yield each group that is missing, with its documents, as soon as it is full.

    Args:
        documents: all, in reading order.
        found: the split of each.
        groups: number of documents in each group of each split.
        missing: groups to yield.

    Raises:
        UserError: these are not the documents that were found before.
    """
    open_groups = {split: ShardGroup(split, 0) for split in SPLITS}
    held: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    seen = Counter[ShardGroup]()
    number = -1
    for number, document in enumerate(documents):
        if number >= len(found.splits):
            raise UserError(RAW_FILES_CHANGED)
        if found.splits[number] == REMOVED:
            continue
        split = SPLITS[found.splits[number]]
        group = open_groups[split]
        if group in missing:
            held[split].append(document)
        seen[group] += 1
        if seen[group] == groups[split][group.number]:
            if group in missing:
                yield group, held[split]
            open_groups[split], held[split] = ShardGroup(split, group.number + 1), []
    if number + 1 != len(found.splits):
        raise UserError(RAW_FILES_CHANGED)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:  # noqa: ARG001 - another model under the same path is another
    return Tokenizer(path)


def build_group(place: Workplace, group: ShardGroup, documents: Sequence[Document]) -> GroupRecord:
    """Encode the documents, write their shards, then the record."""
    tokenizer = _tokenizer(place.corpus / TOKENIZER, place.tokenizer_sha256)
    encoded = [
        EncodedDocument(
            tokenizer.encode(document.text),
            {"id": document.id, "source": document.source, "characters": len(document.text)}
            | ({"metadata": document.metadata} if document.metadata else {}),
        )
        for document in documents
    ]
    shards = []
    for number, members in enumerate(cut_to_shards(encoded, place.shard_bytes)):
        entry = write_shard(place.corpus, f"{group.name}{f'-{number}' if number else ''}.tar", members, place.sources)
        assert entry.bytes <= place.shard_bytes or entry.samples == 1, f"{entry.path} has {entry.bytes} bytes"
        shards.append(entry)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for document in encoded:
        counts += np.bincount(document.ids, minlength=len(counts))
    record = GroupRecord(
        characters=sum(len(document.text) for document in documents),
        shards=shards,
        length_histogram=length_histogram(len(document.ids) for document in encoded),
        token_counts=counts.tolist(),
    )
    write_text(group.record_path(place.records), record.model_dump_json())
    return record


def cut_to_shards(documents: Iterable[EncodedDocument], shard_bytes: int) -> Iterator[list[EncodedDocument]]:
    """Yield lists of documents that fit into a shard: usually one, for that is what a group is planned for."""
    members: list[EncodedDocument] = []
    filled = 0
    for document in documents:
        size = _stored_bytes(document)
        if members and _archive_bytes(filled + size) > shard_bytes:
            yield members
            members, filled = [], 0
        members.append(document)
        filled += size
    yield members


def _stored_bytes(document: EncodedDocument) -> int:
    payloads = (_NPY_HEADER_BYTES + document.ids.nbytes, len(json.dumps(document.info).encode()))
    return sum(_TAR_BLOCK + _rounded_up(payload, _TAR_BLOCK) for payload in payloads)


def _archive_bytes(members: int) -> int:
    return _rounded_up(members + 2 * _TAR_BLOCK, _TAR_RECORD)


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# --------------------------------------------------------------------------------------------------- many at a time


def build_groups(
    place: Workplace,
    tasks: Iterable[tuple[ShardGroup, list[Document]]],
    processes: int,
    finished: Callable[[ShardGroup, GroupRecord], None],
) -> None:
    """Build all groups, in this process or several; `finished` is called in this one, in any order.

    No more than `processes` + 1 groups are handed out at a time.

    Raises:
        UserError: a worker was killed.
    """
    if processes == 1:
        for group, documents in tasks:
            finished(group, build_group(place, group, documents))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    running: dict[Future[GroupRecord], ShardGroup] = {}

    def take(limit: int) -> None:
        while len(running) > limit:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished(running.pop(future), future.result())

    try:
        for group, documents in tasks:
            take(processes)
            running[pool.submit(build_group, place, group, documents)] = group
        take(0)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that encodes was killed, perhaps for want of memory; what is finished is kept: run the same "
            "command again and it continues, with fewer corpus.processes or smaller corpus.shard_bytes if need be. "
            '(In a script of your own, put the call under `if __name__ == "__main__":`)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave interrupts to the parent, and do not outlive it: a pool's worker would wait for work for ever.

    webdataset imports torch if it can, which takes seconds and is of no use here: it goes without.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
