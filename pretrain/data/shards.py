"""One shard: write it as a plain WebDataset tar, index it, verify it, read token ids from it.

Tar members are never extracted and never decoded by anything that could run code: the index says where the ids
of a document lie in the tar, and they are read from there.
"""

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset as wds

from pretrain.data.manifest import ShardEntry
from pretrain.errors import UserError
from pretrain.files import atomic_path, sha256_of


@dataclass(frozen=True)
class EncodedDocument:
    """A document as it is stored: ids without begin or end symbols, and a small description."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    info: dict[str, Any]


def write_shard(corpus: Path, relative: str, documents: Iterable[EncodedDocument]) -> ShardEntry:
    """Write `documents` to `corpus/relative` (a .tar) with its index; the same documents give the same bytes."""
    path = corpus / relative
    prefix = relative.removesuffix(".tar").replace("/", "-")
    with atomic_path(path) as temporary:
        with wds.TarWriter(str(temporary), mtime=0, user="", group="") as tar:
            for number, document in enumerate(documents):
                tar.write({"__key__": f"{prefix}-{number:08d}", "npy": document.ids, "json": document.info})
        index = index_shard(temporary)
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


def index_shard(path: Path) -> npt.NDArray[np.int64]:
    """int64 [samples, 2]: where the token ids of each .npy member begin in the tar, in bytes, and how many they are.

    Raises:
        UserError: a member is not a plain one-dimensional array of unsigned integers.
    """
    rows = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not (member.isfile() and member.name.endswith(".npy")):
                continue
            file = tar.extractfile(member)
            assert file is not None
            header = io.BytesIO(file.read(256))
            try:
                version = np.lib.format.read_magic(header)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = read[version](header)
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}: member {member.name} is not a .npy array: {error}") from error
            if len(shape) != 1 or dtype.kind != "u":
                raise UserError(f"{path}: member {member.name} is {dtype} {shape}, expected one row of unsigned ids")
            rows.append((member.offset_data + header.tell(), shape[0]))
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def verify_shard(corpus: Path, entry: ShardEntry) -> str | None:
    """None if the shard and its index are, byte for byte, what the manifest says; else what is wrong."""
    for relative, digest in ((entry.path, entry.sha256), (entry.index_path, entry.index_sha256)):
        path = corpus / relative
        if not path.is_file():
            return f"{path} is missing"
        if relative == entry.path and path.stat().st_size != entry.bytes:
            return f"{path} has {path.stat().st_size:,} bytes, the manifest says {entry.bytes:,}"
        if sha256_of(path) != digest:
            return f"{path} is damaged: its sha256 is not the manifest's"
    return None


class Shard:
    """A verified shard, open for reading; `lengths` are its documents' numbers of tokens, int64 [samples]."""

    def __init__(self, corpus: Path, entry: ShardEntry, token_dtype: str) -> None:
        """Verify and open.

        Raises:
            UserError: the bytes are not those of the manifest; names the shard and how to repair it.
        """
        if problem := verify_shard(corpus, entry):
            raise UserError(
                f"{problem}. Restore the file from a copy, or delete {corpus / 'manifest.json'} and the shard and run "
                "`diptych data build` again: it makes the same bytes from the same sources"
            )
        index = np.load(corpus / entry.index_path, allow_pickle=False)
        self._offsets, self.lengths = index[:, 0].tolist(), index[:, 1].copy()
        self._num_tokens: list[int] = self.lengths.tolist()
        self._bytes = np.asarray(np.memmap(corpus / entry.path, dtype=np.uint8, mode="r"))
        self._dtype = np.dtype(token_dtype)

    def num_tokens(self, sample: int) -> int:
        """Ids of one document."""
        return self._num_tokens[sample]

    def tokens(self, sample: int, start: int, stop: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Ids [start:stop) of one document, read from the tar and nothing else."""
        begin = self._offsets[sample] + start * self._dtype.itemsize
        end = begin + (stop - start) * self._dtype.itemsize
        return self._bytes[begin:end].view(self._dtype)
