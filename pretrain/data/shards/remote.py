"""Shards of a corpus elsewhere: fetched into a bounded folder that the processes of a node share."""

import fcntl
import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.data.fetching import FetchRule, NotThereError, fetch
from pretrain.data.manifest import MANIFEST, TOKEN_COUNTS, TOKENIZER, ShardEntry
from pretrain.errors import UserError
from pretrain.files import sha256_of

log = logging.getLogger(__name__)


class RemoteShards:
    """Shards of one corpus, fetched when they are needed or a little before, and deleted when room is needed."""

    def __init__(self, url: str, folder: Path, fingerprint: str, limit_bytes: int, rule: FetchRule) -> None:
        """`folder` is the node's cache: all corpora and all processes there share its `limit_bytes`."""
        self._url, self._rule, self._limit = url.rstrip("/"), rule, limit_bytes
        self._cache = folder / "shards"
        self.folder = self._cache / fingerprint[:16]
        """Folder in which the shards lie, under the same relative paths as in the corpus."""
        self._ahead: queue.SimpleQueue[ShardEntry] | None = None

    def ensure(self, entry: ShardEntry, again: bool = False) -> Path:
        """Fetch a shard and its index if they are not there (or `again`); return `folder`.

        Raises:
            NotThereError: the remote side has no such shard, or a damaged one.
            UserError: it cannot be reached.
        """
        path = self.folder / entry.path
        with _locked(path.with_name(path.name + ".lock")):
            files = ((entry.index_path, entry.index_sha256), (entry.path, entry.sha256))
            for relative, digest in files:
                if again and (self.folder / relative).is_file() and sha256_of(self.folder / relative) != digest:
                    (self.folder / relative).unlink()
                if not (self.folder / relative).is_file():
                    fetch(f"{self._url}/{relative}", self.folder / relative, self._rule, digest)
            path.touch()
        self._evict(keep=path)
        return self.folder

    def fetch_ahead(self, entry: ShardEntry) -> None:
        """Fetch a shard in the background; a failure is left to `ensure`."""
        if (self.folder / entry.path).is_file():
            return
        if self._ahead is None:
            self._ahead = queue.SimpleQueue()
            threading.Thread(target=self._fetch_queued, args=(self._ahead,), daemon=True).start()
        self._ahead.put(entry)

    def _fetch_queued(self, waiting: "queue.SimpleQueue[ShardEntry]") -> None:
        while True:
            entry = waiting.get()
            try:
                self.ensure(entry)
            except (NotThereError, UserError, OSError) as error:
                log.warning("%s could not be fetched ahead: %s", entry.path, error)

    def _evict(self, keep: Path) -> None:
        """Delete the shards that were opened longest ago until the rest fits; one that is open stays readable."""
        with _locked(self._cache / "evict.lock"):
            shards = []
            for path in self._cache.glob("*/*/*.tar"):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                shards.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(size for _, size, _ in shards)
            for _, size, path in sorted(shards):
                if total <= self._limit:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    path.with_name(path.name.removesuffix(".tar") + ".index.npy").unlink(missing_ok=True)
                    total -= size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclude all other threads and processes of the node; released however its holder ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_description(url: str, corpus: Path) -> None:
    """Fetch manifest, tokenizer and token counts of a remote corpus, the manifest last.

    Raises:
        UserError: there is no corpus at `url`, or it cannot be reached.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    try:
        for name in (TOKENIZER, TOKEN_COUNTS, MANIFEST):
            fetch(f"{url.rstrip('/')}/{name}", corpus / name, FetchRule())
    except NotThereError as error:
        raise UserError(
            f"there is no corpus at {url}: {error}; set corpus.url to a folder with a manifest.json"
        ) from error
