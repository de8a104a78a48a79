"""Memory of which shards this node has checked already, so that a digest is computed once and not at every resume.

A marker is an empty file whose name is a digest of everything that tells one state of a file from another: host,
path, device, inode, size, times of modification and of change, and the sha256 that was expected. If any of them
differs, it is another name, and the file is read again. The time of change cannot be set by a program.
"""

import hashlib
import json
import os
from pathlib import Path

from pretrain.data.manifest import ShardEntry
from pretrain.data.shards.shard import verify_shard


class VerifiedShards:
    """Check of shards against their manifest, once for each state of a file."""

    def __init__(self, cache: Path | None) -> None:
        """`cache` is a folder of this node; None, or one that cannot be written, remembers nothing."""
        self._folder = cache and cache / "verified"

    def problem(self, corpus: Path, entry: ShardEntry) -> str | None:
        """Return what `verify_shard` says, or said of the same state of the files."""
        marker = self._marker(corpus, entry)
        if marker is not None and marker.exists():
            return None
        problem = verify_shard(corpus, entry)
        # A file that was replaced while it was read has another marker now.
        if problem is None and marker is not None and marker == self._marker(corpus, entry):
            try:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
            except OSError:
                self._folder = None
        return problem

    def _marker(self, corpus: Path, entry: ShardEntry) -> Path | None:
        if self._folder is None:
            return None
        state: list[object] = [os.uname().nodename]
        for relative, digest in ((entry.path, entry.sha256), (entry.index_path, entry.index_sha256)):
            path = (corpus / relative).absolute()
            try:
                stat = path.stat()
            except OSError:
                return None
            state += [str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest]
        name = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        return self._folder / name[:2] / name[2:]
