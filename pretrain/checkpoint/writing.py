"""Files of a checkpoint, written, hashed and flushed; and the rename by which a checkpoint appears."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.folder import PUT_ASIDE, hidden_name, remove_checkpoint
from pretrain.checkpoint.format import FileEntry
from pretrain.files import fsync_path

CHUNK = 8 * 2**20
"""Bytes that are hashed and written at a time."""
FLUSH = 64 * 2**20
"""Bytes of a file after which it begins to be flushed to the disk."""


def publish(temporary: Path, target: Path) -> None:
    """Give a finished folder its name; one that has it already is put aside until then, and is deleted after."""
    aside = None
    if target.exists():
        aside = target.with_name(hidden_name(target.name, PUT_ASIDE))
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    fsync_path(target.parent)
    if aside is not None:
        with suppress(OSError):  # what is left of it is cleared away at the next start
            remove_checkpoint(aside)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileEntry:
    """Write float32 or int64 tensors, on any device, as a safetensors file, and flush it to the disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        dtype = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_bytes(path, chain([len(text).to_bytes(8, "little"), text], map(_bytes_of, tensors.values())))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_bytes(path: Path, contents: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file and flush it to the disk. Bytes are hashed on their way, not read back.

    Hashing, writing and flushing go on side by side: each would wait for another part of the machine.
    """
    digest, size = hashlib.sha256(), 0
    hashing: Future[None] | None = None
    flushing: Future[None] | None = None
    with path.open("xb") as file, ThreadPoolExecutor(2) as pool:
        for content in contents:
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                if hashing is not None:
                    hashing.result()
                hashing = pool.submit(digest.update, chunk)
                size += file.write(chunk)
                if size >= FLUSH and (flushing is None or flushing.done()):
                    if flushing is not None:
                        flushing.result()  # the kernel tells of an error only once
                    flushing = pool.submit(os.fdatasync, file.fileno())
        for done in (hashing, flushing):
            if done is not None:
                done.result()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(bytes=size, sha256=digest.hexdigest())
