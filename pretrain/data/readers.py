"""Raw files -> `Document`, streamed one at a time: plain text, JSON lines and FASTA here; containers.py has the rest.

What a record is, which ones are bad and how they are named in an error is decided here; tokens and shards are not.
"""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, Literal, cast

from pretrain.config import SourceConfig
from pretrain.data.containers import open_zstd, parquet_records, webdataset_records
from pretrain.data.documents import BadRecord, DamagedFileError, Document, Format, InputFile, Record, decode_utf8
from pretrain.data.remote import fetch_raw
from pretrain.data.tokenizer import RESIDUES
from pretrain.data.verified import default_cache
from pretrain.errors import UserError
from pretrain.redaction import redact

SUFFIXES: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".fasta": "fasta", ".fa": "fasta", ".faa": "fasta"}
SUFFIXES |= {".parquet": "parquet", ".tar": "webdataset"}
_PACKED = (".gz", ".zst")
_BUFFER_BYTES = 2**17
_SKIP_HINT = "(--on-bad skip / corpus.on_bad=skip leaves such records out and counts them)"
_ILLEGAL_RESIDUE = re.compile(f"[^{RESIDUES}]")


_Line = tuple[int, int, bytes]
"""Number from 1, byte offset in the (unpacked) file, bytes with the line break."""


def source_name(source: SourceConfig) -> str:
    """What the corpus calls the source."""
    return source.name or redact(Path(source.path).name)


def find_inputs(source: SourceConfig) -> list[InputFile]:
    """The files of a source, sorted by path.

    Raises:
        UserError: nothing matches the path, or the format cannot be told from a file's name.
    """
    if "://" in source.path:
        return [InputFile(p, p.name, _format_of(source, p)) for p in fetch_raw(source.path, default_cache())]
    place = Path(source.path).expanduser()
    if place.is_dir():
        visible = (p for p in place.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(place)))
        paths = [p for p in visible if _accepts(source, p)]
        root = place
    else:
        paths = [place] if place.is_file() else [Path(p) for p in glob.glob(str(place), recursive=True)]  # noqa: PTH207
        paths = [p for p in paths if p.is_file()]
        root = _fixed_part(place)
    if not paths:
        accepted = ", ".join(s for s, f in SUFFIXES.items() if source.format in ("auto", f))
        inside = f"a folder without {accepted} files (or .gz or .zst of them)" if place.is_dir() else "nothing there"
        raise UserError(
            f"source {source.path!r} matches no file ({inside}); "
            "set corpus.sources[].path to a file, a folder or a glob (relative to the working directory)"
        )
    return [InputFile(p, p.relative_to(root).as_posix(), _format_of(source, p)) for p in sorted(paths)]


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _fixed_part(pattern: Path) -> Path:
    """The folder that a file or glob lies in: everything before the first part with a wildcard."""
    if pattern.is_file():
        return pattern.parent
    parts = pattern.parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:wild])


def _known_format(path: Path) -> Format | None:
    return SUFFIXES.get(Path(path.stem if path.suffix in _PACKED else path.name).suffix)


def _accepts(source: SourceConfig, path: Path) -> bool:
    known = _known_format(path)
    return known is not None and source.format in ("auto", known)


def _format_of(source: SourceConfig, path: Path) -> Format:
    if source.format != "auto":
        return source.format
    known = _known_format(path)
    if known is None:
        raise UserError(
            f"cannot tell the format of {path} from its name (known: {', '.join(SUFFIXES)}, with .gz or .zst too); set "
            "corpus.sources[].format to text, jsonl, fasta, parquet or webdataset, or narrow corpus.sources[].path"
        )
    return known


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


def json_record(where: str, default_id: str, line: str, source: SourceConfig) -> Record:
    """The document of a JSON object; `where` names it in errors."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord("invalid JSON", f"{where} is not JSON: {error}.")
    if not isinstance(value, dict):
        return BadRecord("no JSON object", f"{where} holds a {type(value).__name__}, expected an object with fields.")
    if source.text_field not in value:
        fields = ", ".join(map(repr, value)) or "none"
        return BadRecord(
            "no text field",
            f"{where} has no field {source.text_field!r}; its fields: {fields}. "
            "corpus.sources[].text_field says which one holds the text.",
        )
    text = value[source.text_field]
    if not isinstance(text, str):
        kind = type(text).__name__
        return BadRecord("text is no string", f"{where}: field {source.text_field!r} is {kind}, expected a string.")
    document_id = str(value.get(source.id_field, default_id))
    try:
        (text + document_id).encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord((text + document_id)[error.start]):04x}"
        return BadRecord("lone surrogate", f"{where}: {lone} is half a surrogate pair, which is no character.")
    metadata = {field: value[field] for field in source.metadata_fields if field in value}
    return document_id, text, metadata


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
