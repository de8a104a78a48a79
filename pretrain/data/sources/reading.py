"""Files of a source -> documents, streamed one at a time: what happens to a record that cannot be read.

How records are cut from a format is in the file of that format; tokens and shards are not known here.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from typing import Literal

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import BadRecord, Document, Format, InputFile, Record
from pretrain.data.sources.fasta import fasta_records, protein_record
from pretrain.data.sources.inputs import source_name
from pretrain.data.sources.jsonl import jsonl_records
from pretrain.data.sources.parquet import parquet_records
from pretrain.data.sources.plain_text import text_records
from pretrain.data.sources.unpacking import DamagedFileError, open_unpacked
from pretrain.data.sources.webdataset import webdataset_records
from pretrain.errors import UserError

_SKIP_HINT = "(--on-bad skip / corpus.on_bad=skip leaves such records out and counts them)"
_RECORDS: dict[Format, Callable[[InputFile, BufferedReader, SourceConfig], Iterator[Record]]] = {
    "text": text_records,
    "jsonl": jsonl_records,
    "fasta": fasta_records,
    "webdataset": webdataset_records,
}


def read_documents(
    source: SourceConfig,
    inputs: Iterable[InputFile],
    on_bad: Literal["error", "skip"],
    skipped: Counter[str],
    residues_only: bool = False,
) -> Iterator[Document]:
    """Yield all documents of a source, in order; only one is in memory at a time. Blank ones are left out.

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
                record = protein_record(file.path, *record)
            if isinstance(record, BadRecord):
                if on_bad == "error":
                    raise UserError(f"{record.message} {_SKIP_HINT}")
                skipped[record.reason] += 1
            elif record[1].strip():
                yield Document(record[0], record[1], name, record[2] if len(record) == 3 else {})


def _records(file: InputFile, source: SourceConfig) -> Iterator[Record]:
    if file.format == "parquet":
        yield from parquet_records(file, source)
        return
    try:
        with open_unpacked(file.path) as stream:
            if stream.peek(1):
                yield from _RECORDS[file.format](file, stream, source)
            else:
                yield BadRecord("empty file", f"{file.path} is empty.")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield BadRecord("damaged gzip", f"{file.path} is truncated or damaged, or is no gzip file: {error}.")
    except DamagedFileError as error:
        yield BadRecord("damaged zstandard", f"{file.path} is truncated or damaged, or is no .zst file: {error}.")
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from error
