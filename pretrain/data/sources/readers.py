"""Raw files -> `Document`, streamed one at a time: plain text, JSON lines and FASTA here; containers.py has the rest.

What a record is, which ones are bad and how they are named in an error is decided here; tokens and shards are not.
"""

import codecs
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, Literal, cast

from pretrain.config.data import SourceConfig
from pretrain.data.sources.containers import open_zstd, parquet_records, webdataset_records
from pretrain.data.sources.documents import (
    BadRecord,
    DamagedFileError,
    Document,
    InputFile,
    Record,
    decode_utf8,
)
from pretrain.data.sources.inputs import source_name
from pretrain.data.sources.jsonl import json_record
from pretrain.data.tokenizer import RESIDUES
from pretrain.errors import UserError

_BUFFER_BYTES = 2**17


_SKIP_HINT = "(--on-bad skip / corpus.on_bad=skip leaves such records out and counts them)"


_ILLEGAL_RESIDUE = re.compile(f"[^{RESIDUES}]")


_Line = tuple[int, int, bytes]
"""Number from 1, byte offset in the (unpacked) file, bytes with the line break."""


def read_documents(
    source: SourceConfig,
    inputs: Iterable[InputFile],
    on_bad: Literal["error", "skip"],
    skipped: Counter[str],
    residues_only: bool = False,
) -> Iterator[Document]:
    """All documents of a source, in order; only one is in memory at a time. Blank ones are left out.

    Args:
        source: says how records are cut.
        inputs: its files, from `find_inputs`.
        on_bad: stop at a record that cannot be read, or count it in `skipped` and go on.
        skipped: reason -> records; added to.
        residues_only: every text is a protein sequence, whatever the file's format.

    Raises:
        UserError: naming the file, the place in it and the defect.
    """
    name = source_name(source)
    for file in inputs:
        for record in _records(file, source):
            if not isinstance(record, BadRecord) and residues_only and file.format != "fasta" and record[1].strip():
                record = _protein(file.path, *record)
            if isinstance(record, BadRecord):
                if on_bad == "error":
                    raise UserError(f"{record.message} {_SKIP_HINT}")
                skipped[record.reason] += 1
            elif record[1].strip():
                yield Document(record[0], record[1], name, record[2] if len(record) == 3 else {})


def _records(file: InputFile, source: SourceConfig) -> Iterator[Record]:
    try:
        if file.format == "parquet":
            yield from parquet_records(file, source)
            return
        with _open(file.path) as stream:
            if not stream.peek(1):
                yield BadRecord("empty file", f"{file.path} is empty.")
            elif file.format == "text":
                yield from _text_records(file, stream, source.separator)
            elif file.format == "jsonl":
                yield from _json_records(file, stream, source)
            elif file.format == "webdataset":
                yield from webdataset_records(file, stream, source)
            else:
                yield from _fasta_records(file, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield BadRecord("damaged gzip", f"{file.path} is truncated or damaged, or is no gzip file: {error}.")
    except DamagedFileError as error:
        yield BadRecord("damaged zstandard", f"{file.path} is truncated or damaged, or is no .zst file: {error}.")
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BufferedReader:
    if path.suffix == ".zst":
        return open_zstd(path)
    if path.suffix == ".gz":
        # The buffer makes lines in C; gzip's own readline is Python, and several times slower.
        return BufferedReader(cast(RawIOBase, gzip.open(path, "rb")), _BUFFER_BYTES)
    return path.open("rb")


def _lines(stream: BufferedReader) -> Iterator[_Line]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        yield number, offset, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        offset += len(line)


def _decode(file: InputFile, offset: int, raw: bytes) -> str | BadRecord:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return decode_utf8(str(file.path), offset, raw)


# ------------------------------------------------------------------------------------------------------------- text


def _text_records(file: InputFile, stream: BufferedReader, separator: str | None) -> Iterator[Record]:
    if separator is None:
        text = _decode(file, 0, stream.read())
        yield text if isinstance(text, BadRecord) else (file.label, text.removeprefix("\ufeff"))
        return
    try:
        pattern = re.compile(separator)
    except re.error as error:
        raise UserError(f"corpus.sources[].separator = {separator!r} is not a regular expression: {error}") from error
    start, parts, bad = 1, list[str](), None
    for number, offset, raw in _lines(stream):
        line = _decode(file, offset, raw)
        if isinstance(line, BadRecord):
            bad = bad or line
            continue
        separates = pattern.search(line.rstrip("\r\n")) is not None
        if separates and (parts or bad):
            yield bad or (f"{file.label}:{start}", "".join(parts))
            start, parts, bad = number, [], None
        if not separates or line.strip():
            parts.append(line)
    yield bad or (f"{file.label}:{start}", "".join(parts))


# ------------------------------------------------------------------------------------------------------- JSON lines


def _json_records(file: InputFile, stream: BufferedReader, source: SourceConfig) -> Iterator[Record]:
    for number, offset, raw in _lines(stream):
        line = _decode(file, offset, raw)
        if isinstance(line, BadRecord):
            yield line
        elif line.strip():
            yield json_record(f"{file.path}:{number}", f"{file.label}:{number}", line, source)


# ------------------------------------------------------------------------------------------------------------ FASTA


def _fasta_records(file: InputFile, stream: BufferedReader) -> Iterator[Record]:
    header: str | None = None
    parts, bad = list[str](), None
    for _, offset, raw in _lines(stream):
        line = _decode(file, offset, raw)
        if raw.startswith(b">"):
            if header is not None or parts or bad:
                yield bad or _fasta_record(file, header, parts)
            header, parts, bad = "", [], None
        if isinstance(line, BadRecord):
            bad = bad or line
        elif raw.startswith(b">"):
            header = line
        elif line.strip():
            parts.append(line)
    if header is not None or parts or bad:
        yield bad or _fasta_record(file, header, parts)


def _fasta_record(file: InputFile, header: str | None, parts: list[str]) -> Record:
    if header is None:
        return BadRecord("no FASTA header", f"{file.path} does not begin with a '>' line, so it is no FASTA file.")
    words = header[1:].split(maxsplit=1)
    if not words:
        return BadRecord("no record id", f"{file.path}: a '>' line without an id before {''.join(parts)[:20]!r}.")
    return _protein(file.path, words[0], "".join(parts))


def _protein(path: Path, record_id: str, text: str, metadata: dict[str, Any] | None = None) -> Record:
    """The sequence in capitals, without white space and without the final stop."""
    sequence = "".join(text.split()).upper().removesuffix("*")
    if not sequence:
        return BadRecord("no residues", f"{path}: record {record_id} has no residues.")
    if illegal := _ILLEGAL_RESIDUE.search(sequence):
        return BadRecord(
            "illegal residue",
            f"{path}: record {record_id} has {illegal.group()!r} at position {illegal.start() + 1:,}, which is no "
            f"residue (legal: {RESIDUES}, and '*' at the end).",
        )
    return record_id, sequence, metadata or {}
