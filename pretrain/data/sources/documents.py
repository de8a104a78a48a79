"""What a raw file is and what is read from it: a document, or a record that cannot be one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Format = Literal["text", "jsonl", "fasta", "parquet", "webdataset"]


@dataclass(frozen=True)
class Document:
    """One document as it was read."""

    id: str
    """Says where it came from: the record's own id, or file name and line."""
    text: str
    source: str
    """Name of the source."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The source's `metadata_fields`, plain JSON values."""


@dataclass(frozen=True)
class InputFile:
    """One raw file of a source."""

    path: Path
    label: str
    """Name in document ids: relative to the source's folder, so that it does not depend on where that lies."""
    format: Format


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read."""

    reason: str
    """A few words, the same for all records with this defect: what skipped records are counted by."""
    message: str
    """File, place and defect, for the error."""


Record = tuple[str, str] | tuple[str, str, dict[str, Any]] | BadRecord
"""Id, text and perhaps metadata, or why there is none."""
