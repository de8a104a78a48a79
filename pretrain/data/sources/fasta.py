"""FASTA: protein sequences, each after a line that begins with '>' and its id."""

import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import BadRecord, InputFile, Record
from pretrain.data.sources.unpacking import text_lines
from pretrain.data.tokenizer import RESIDUES

_ILLEGAL_RESIDUE = re.compile(f"[^{RESIDUES}]")


def fasta_records(file: InputFile, stream: BufferedReader, source: SourceConfig) -> Iterator[Record]:  # noqa: ARG001
    """Yield the sequence after each header."""
    header: str | None = None
    lines, bad = list[str](), None
    for _, raw, line in text_lines(file.path, stream):
        if raw.startswith(b">"):
            if header is not None or lines or bad:
                yield bad or _record(file.path, header, lines)
            header, lines, bad = "", [], None
        if isinstance(line, BadRecord):
            bad = bad or line
        elif raw.startswith(b">"):
            header = line
        elif line.strip():
            lines.append(line)
    if header is not None or lines or bad:
        yield bad or _record(file.path, header, lines)


def _record(path: Path, header: str | None, lines: list[str]) -> Record:
    if header is None:
        return BadRecord("no FASTA header", f"{path} does not begin with a '>' line, so it is no FASTA file.")
    words = header[1:].split(maxsplit=1)
    if not words:
        return BadRecord("no record id", f"{path}: a '>' line without an id before {''.join(lines)[:20]!r}.")
    return protein_record(path, words[0], "".join(lines))


def protein_record(path: Path, record_id: str, text: str, metadata: dict[str, Any] | None = None) -> Record:
    """Return the sequence in capitals, without white space and without the final stop, if it is one."""
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
