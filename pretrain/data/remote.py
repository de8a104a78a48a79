"""Files from elsewhere: fetched whole, with retries, into a bounded folder that the processes of a node share.

What a shard must be is the manifest's business; here bytes arrive or they do not.
"""

import fcntl
import hashlib
import logging
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.data.manifest import MANIFEST, TOKEN_COUNTS, TOKENIZER, ShardEntry
from pretrain.errors import UserError
from pretrain.files import atomic_path, sha256_of

log = logging.getLogger(__name__)

_CHUNK = 2**20
_LONGEST_PAUSE_S = 30.0


class NotThereError(Exception):
    """The other side answers that there is no such file."""


@dataclass(frozen=True)
class FetchRule:
    """How patient a fetch is."""

    timeout_s: float = 30.0
    """Without a byte for so long, an attempt has failed."""
    attempts: int = 8
    pause_s: float = 0.5
    """After the first failed attempt; doubled after each further one, up to half a minute."""


def open_url(url: str, timeout_s: float) -> BinaryIO:
    """The bytes of a URL: http and https by the standard library, s3, gs and others by fsspec."""
    if url.startswith(("http://", "https://")):
        return cast(BinaryIO, urllib.request.urlopen(url, timeout=timeout_s))
    return cast(BinaryIO, _file_system(url)[0].open(url, "rb"))


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        UserError: it needs a package that is not installed, or nobody knows such URLs.
    """
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(url.partition("://")[0])
        what = f"the package {package}: run `pip install {package}`" if package else f"another package: {error}"
        raise UserError(f"{url} needs {what}") from error
    except ValueError as error:
        raise UserError(f"{url} is of a kind that fsspec does not know: {error}") from error


def fetch(url: str, target: Path, rule: FetchRule, sha256: str | None = None) -> None:
    """Write the bytes of `url` to `target`, whole or not at all; what does not match `sha256` is fetched again.

    Raises:
        NotThereError: there is no such file, or it has another digest at every attempt.
        UserError: it could not be fetched whole.
    """
    pause, failure = rule.pause_s, ""
    for attempt in range(rule.attempts):
        if attempt:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        try:
            with atomic_path(target) as temporary:
                found = _copy(url, temporary, rule.timeout_s)
                if sha256 is None or found == sha256:
                    return
                failure = "its sha256 is not the manifest's"
                raise OSError(failure)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404, 410):
                raise NotThereError(f"{url}: {error}") from error
            failure = str(error)
        except UserError:
            raise
        except FileNotFoundError as error:
            raise NotThereError(f"{url}: {error}") from error
        except Exception as error:  # noqa: BLE001 - each file system of fsspec has exceptions of its own
            failure = str(error) or type(error).__name__
        log.warning("attempt %d of %d to fetch %s failed: %s", attempt + 1, rule.attempts, url, failure)
    if failure == "its sha256 is not the manifest's":
        raise NotThereError(f"{url} is damaged: {failure}")
    raise UserError(f"{url} could not be fetched in {rule.attempts} attempts, the last: {failure}; run again to resume")


def _copy(url: str, target: Path, timeout_s: float) -> str:
    """Copy, and give the sha256; a connection that ends before the announced length is an error."""
    digest, size = hashlib.sha256(), 0
    with open_url(url, timeout_s) as source, target.open("wb") as file:
        announced = getattr(source, "length", None)
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
    if announced is not None and size < announced:
        raise OSError(f"cut off after {size:,} of {announced:,} bytes")
    return digest.hexdigest()


class RemoteShards:
    """Shards of one corpus, fetched when they are needed or a little before, and deleted when room is needed."""

    def __init__(self, url: str, folder: Path, fingerprint: str, limit_bytes: int, rule: FetchRule) -> None:
        """`folder` is the node's cache: all corpora and all processes there share its `limit_bytes`."""
        self._url, self._rule, self._limit = url.rstrip("/"), rule, limit_bytes
        self._cache = folder / "shards"
        self.folder = self._cache / fingerprint[:16]
        """Where the shards lie, under the same relative paths as in the corpus."""
        self._ahead: queue.SimpleQueue[ShardEntry] | None = None

    def ensure(self, entry: ShardEntry, again: bool = False) -> Path:
        """Fetch a shard and its index if they are not there (or `again`); gives `folder`.

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
        """Fetch it in the background; a failure is left to `ensure`."""
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
    """Exclusive among all threads and processes of the node; released however its holder ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_description(url: str, corpus: Path) -> None:
    """Manifest, tokenizer and token counts of a remote corpus, the manifest last.

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


def fetch_raw(url: str, cache: Path) -> list[Path]:
    """The raw files that a URL (or, but for http, a pattern) names, fetched once into `cache`.

    Raises:
        UserError: there are none, or they cannot be reached.
    """
    folder = cache / "raw" / hashlib.sha256(url.encode()).hexdigest()[:16]
    urls = [url]
    if not url.startswith(("http://", "https://")):
        system, pattern = _file_system(url)
        urls = [system.unstrip_protocol(found) for found in sorted(system.glob(pattern))]
    paths = [folder / each.split("?")[0].rstrip("/").rpartition("/")[2] for each in urls]
    try:
        for each, path in zip(urls, paths, strict=True):
            if not path.is_file():
                fetch(each, path, FetchRule())
    except NotThereError as error:
        raise UserError(f"source {url!r} cannot be read: {error}") from error
    if not paths:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"source {url!r} matches no file")
    return paths
