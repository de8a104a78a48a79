"""Files behind URLs, fetched whole and with retries. Which files, and what becomes of them, is not known here."""

import hashlib
import logging
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.errors import UserError
from pretrain.files import atomic_path

log = logging.getLogger(__name__)
_CHUNK_BYTES = 2**20
_LONGEST_PAUSE_S = 30.0


class NotThereError(Exception):
    """Answer of the other side that there is no such file."""


@dataclass(frozen=True)
class FetchRule:
    """How patient a fetch is."""

    timeout_s: float = 30.0
    """Seconds without a byte after which an attempt has failed."""
    attempts: int = 8
    pause_s: float = 0.5
    """Seconds to wait after the first failed attempt; doubled after each further one, up to half a minute."""


def open_url(url: str, timeout_s: float) -> BinaryIO:
    """Open a URL for reading: http and https by the standard library, s3, gs and others by fsspec."""
    if url.startswith(("http://", "https://")):
        return cast(BinaryIO, urllib.request.urlopen(url, timeout=timeout_s))
    return cast(BinaryIO, file_system(url)[0].open(url, "rb"))


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

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
    """Copy, and return the sha256; a connection that ends before the announced length is an error."""
    digest, size = hashlib.sha256(), 0
    with open_url(url, timeout_s) as source, target.open("wb") as file:
        announced = getattr(source, "length", None)
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
    if announced is not None and size < announced:
        raise OSError(f"cut off after {size:,} of {announced:,} bytes")
    return digest.hexdigest()


def default_cache() -> Path:
    """Return the folder `diptych` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych"
