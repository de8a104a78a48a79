"""What is flushed to the disk and renamed, in order: what a crash may leave depends on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


@contextmanager
def disk_calls() -> Iterator[list[str]]:
    """Calls of fsync and rename inside: `fsync NAME`, `rename NAME to NAME`; random words of names left out."""
    calls: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name_of(path: object) -> str:
        first, *rest = Path(str(path)).name.lstrip(".").split(".")
        return ".".join([first, *(word for word in rest if not set(word) <= set("0123456789abcdef"))])

    def flush(fd: int) -> None:
        calls.append(f"fsync {name_of(Path(f'/proc/self/fd/{fd}').readlink())}")
        fsync(fd)

    def move(kind):
        def moved(old: object, new: object, **options: object) -> None:
            calls.append(f"rename {name_of(old)} to {name_of(new)}")
            kind(old, new, **options)

        return moved

    with mock.patch("os.fsync", flush), mock.patch("os.rename", move(rename)), mock.patch("os.replace", move(replace)):
        yield calls
