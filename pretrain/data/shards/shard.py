"""One shard: write it as a plain WebDataset tar, index it, verify it, read token ids from it.

Tar members are never extracted and never decoded by anything that could run code: the index says where the ids
of a document lie in the tar, and they are read from there.
"""

import io
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.arrays import AnyInts, Ints
from pretrain.data.manifest import ShardEntry
from pretrain.data.tar import TarMember, tar_members
from pretrain.errors import UserError
from pretrain.files import atomic_path, sha256_of


@dataclass(frozen=True)
class EncodedDocument:
    """A document as it is stored: ids without begin or end symbols, and a small description."""

    ids: AnyInts
    info: dict[str, Any]


def write_shard(
    corpus: Path, relative: str, documents: Iterable[EncodedDocument], sources: Sequence[str]
) -> ShardEntry:
    """Write `documents` to `corpus/relative` (a .tar) with its index; the same documents give the same bytes.

    `sources` are the names that the index numbers.
    """
    import webdataset as wds  # which imports torch

    numbers = {name: number for number, name in reversed(list(enumerate(sources)))}
    of_documents = []
    prefix = relative.removesuffix(".tar").replace("/", "-")
    with atomic_path(corpus / relative) as temporary:
        with wds.TarWriter(str(temporary), mtime=0, user="", group="") as tar:
            for number, document in enumerate(documents):
                of_documents.append(numbers[document.info["source"]])
                tar.write({"__key__": f"{prefix}-{number:08d}", "npy": document.ids, "json": document.info})
        index = np.column_stack((index_shard(temporary), np.array(of_documents, dtype=np.int64)))
    return add_index(corpus, relative, index)


def add_index(corpus: Path, relative: str, index: Ints) -> ShardEntry:
    """Write the index int64 [samples, 3] of the shard `corpus/relative` beside it; return their entry."""
    path = corpus / relative
    index_path = path.with_name(path.name.removesuffix(".tar") + ".index.npy")
    with atomic_path(index_path) as temporary, temporary.open("wb") as file:
        np.save(file, index)
    return ShardEntry(
        path=relative,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        index_sha256=sha256_of(index_path),
        samples=len(index),
        tokens=int(index[:, 1].sum()),
    )


def index_shard(path: Path) -> Ints:
    """Return int64 [samples, 2]: the byte of the tar where each .npy member's token ids begin, and how many they are.

    Raises:
        UserError: the tar is damaged, or a member is not a plain one-dimensional array of unsigned integers.
    """
    rows = []
    with path.open("rb") as archive:
        for member in tar_members(archive, str(path)):
            if member.name.endswith(".npy"):
                offset, count, _ = read_npy_header(member, str(path))
                rows.append((member.offset + offset, count))
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def read_index(path: Path) -> Ints:
    """Return the index of a shard, int64 [samples, 3]; in one from before there were sources, all are of the first."""
    index = np.load(path, allow_pickle=False)
    return np.hstack((index, np.zeros((len(index), 1), np.int64))) if index.shape[1:] == (2,) else index


def read_npy_header(member: TarMember, label: str) -> tuple[int, int, np.dtype[Any]]:
    """Return where the ids begin in a .npy member, how many they are, and of which type.

    Raises:
        UserError: it is not a plain one-dimensional array of integers; a pickle is not.
    """
    header = io.BytesIO(member.content)
    try:
        version = np.lib.format.read_magic(header)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version](header)
    except (ValueError, KeyError) as error:
        raise UserError(f"{label}: member {member.name} is not a .npy array: {error}") from error
    if len(shape) != 1 or dtype.kind not in "ui" or dtype != dtype.newbyteorder("<"):
        raise UserError(f"{label}: member {member.name} is {dtype} {shape}, expected one row of token ids")
    if header.tell() + shape[0] * dtype.itemsize != len(member.content):
        raise UserError(f"{label}: member {member.name} does not hold the {shape[0]:,} ids of its header")
    return header.tell(), shape[0], dtype


def verify_shard(corpus: Path, entry: ShardEntry) -> str | None:
    """Return what is wrong with a shard or its index; None if they are, byte for byte, what the manifest says."""
    for relative, digest in ((entry.path, entry.sha256), (entry.index_path, entry.index_sha256)):
        path = corpus / relative
        if not path.is_file():
            return f"{path} is missing"
        if relative == entry.path and path.stat().st_size != entry.bytes:
            return f"{path} has {path.stat().st_size:,} bytes, the manifest says {entry.bytes:,}"
        if sha256_of(path) != digest:
            return f"{path} is damaged: its sha256 is not the manifest's"
    return None


class DamagedShardError(UserError):
    """A shard is missing, or not what the manifest says."""


class Shard:
    """A verified shard, open for reading.

    Attributes:
        ids: the whole file, seen as ids; only what belongs to a document means anything.
        firsts: int64 [samples]: place of each document's first id in `ids`.
        lengths: int64 [samples]: how many ids each document has.
        sources: int64 [samples]: number of each document's source in the manifest.
    """

    def __init__(
        self,
        corpus: Path,
        entry: ShardEntry,
        token_dtype: str,
        problem_of: Callable[[Path, ShardEntry], str | None] = verify_shard,
    ) -> None:
        """Verify and open.

        Raises:
            DamagedShardError: the bytes are not those of the manifest; names the shard and how to repair it.
        """
        if problem := problem_of(corpus, entry):
            raise DamagedShardError(
                f"{problem}. Restore the file from a copy, or delete {corpus / 'manifest.json'} and the shard and run "
                "`diptych data build` again: it makes the same bytes from the same sources. With data.on_corrupt=skip "
                "the run goes on without it"
            )
        dtype = np.dtype(token_dtype)
        index = read_index(corpus / entry.index_path)
        if problem := _index_problem(index, entry, dtype):
            raise DamagedShardError(f"{corpus / entry.index_path} {problem}; make the corpus again")
        self.firsts, self.lengths, self.sources = index[:, 0] // dtype.itemsize, index[:, 1].copy(), index[:, 2].copy()
        with (corpus / entry.path).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids = np.frombuffer(mapped, dtype, entry.bytes // dtype.itemsize)

    def tokens(self, sample: int, start: int, stop: int) -> AnyInts:
        """Return the ids [start:stop) of one document, read from the tar and nothing else."""
        first = self.firsts[sample]
        return self.ids[first + start : first + stop]


def _index_problem(index: AnyInts, entry: ShardEntry, dtype: np.dtype[Any]) -> str | None:
    """Return why an index cannot belong to a shard, although its digest is right; nothing is read outside the file."""
    if index.ndim != 2 or index.shape[1] < 3 or index.dtype != np.int64 or len(index) != entry.samples:
        return f"is {index.dtype} {list(index.shape)}, not the index of {entry.samples:,} samples"
    begins, counts = index[:, 0], index[:, 1]
    if (begins < 0).any() or (counts < 0).any() or (counts > entry.bytes).any():
        return "points outside its shard"
    if (begins + counts * dtype.itemsize > entry.bytes).any() or (begins % dtype.itemsize).any():
        return "points outside its shard"
    return None
