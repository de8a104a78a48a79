"""Bytes of a raw file, unpacked if it is gzip or zstandard, and their lines as text. What a record is, is not here."""

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.data.sources.documents import BadRecord

_BUFFER_BYTES = 2**17


class DamagedFileError(Exception):
    """The rest of a raw file cannot be unpacked."""


class _ZstdReader(io.RawIOBase):
    """Unpacks frame after frame; unlike zstandard's own reader it does not take a truncated file for a whole one."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._new, self._error = file, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_BUFFER_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise DamagedFileError("it ends inside a zstandard frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._unpacked, self._packed = self._frame.decompress(self._packed), b""
            except self._error as error:
                raise DamagedFileError(f"{error}") from error
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        taken = self._unpacked[: len(buffer)]
        buffer[: len(taken)] = taken
        self._unpacked = self._unpacked[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_unpacked(path: Path) -> io.BufferedReader:
    """Open a file, to be unpacked while it is read if it ends in .gz or .zst.

    Reading a damaged one raises what `gzip` raises, or DamagedFileError.
    """
    if path.suffix == ".zst":
        return io.BufferedReader(cast(io.RawIOBase, _ZstdReader(path.open("rb"))), _BUFFER_BYTES)
    if path.suffix == ".gz":
        # The buffer makes lines in C; gzip's own readline is Python, and several times slower.
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(path, "rb")), _BUFFER_BYTES)
    return path.open("rb")


def decode_utf8(label: Path | str, offset: int, raw: bytes) -> str | BadRecord:
    """Return the text, or which byte is none; `offset` is the place of `raw` in what `label` names."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(
            "not UTF-8",
            f"{label} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {offset + error.start:,}.",
        )


def text_lines(path: Path, stream: io.BufferedReader) -> Iterator[tuple[int, bytes, str | BadRecord]]:
    """Yield each line as its number from 1, its bytes with the line break, and its text or what is wrong with it."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        yield number, raw, decode_utf8(path, offset, raw)
        offset += len(line)
