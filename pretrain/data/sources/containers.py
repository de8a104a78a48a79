"""Documents inside other files: zstandard streams, parquet tables, WebDataset tars of .txt and .json members."""

import io
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import BadRecord, DamagedFileError, InputFile, Record, decode_utf8
from pretrain.data.tar import TarMember, tar_members
from pretrain.errors import UserError

_CHUNK = 2**17


_ROWS = 1024


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
            self._packed = self._packed or self._file.read(_CHUNK)
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


def open_zstd(path: Path) -> io.BufferedReader:
    """A .zst file, unpacked while it is read; a damaged one raises DamagedFileError."""
    return io.BufferedReader(cast(io.RawIOBase, _ZstdReader(path.open("rb"))), _CHUNK)


def parquet_records(file: InputFile, source: SourceConfig) -> Iterator[Record]:
    """One document a row; only the columns of text, id and metadata are read, some rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file.path)
        names = table.schema_arrow.names
        if source.text_field not in names:
            yield BadRecord(
                "no text field",
                f"{file.path} has no column {source.text_field!r}; its columns: {', '.join(map(repr, names))}. "
                "corpus.sources[].text_field says which one holds the text.",
            )
            return
        if absent := set(source.metadata_fields) - set(names):
            raise UserError(
                f"{file.path} has no column {', '.join(map(repr, sorted(absent)))}; its columns: "
                f"{', '.join(map(repr, names))}. corpus.sources[].metadata_fields says which ones are kept"
            )
        has_ids = source.id_field in names
        columns = [
            *dict.fromkeys([source.text_field, *([source.id_field] if has_ids else []), *source.metadata_fields])
        ]
        row = 0
        for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
            for values in batch.to_pylist():
                row += 1
                text, own_id = values[source.text_field], values[source.id_field] if has_ids else None
                if not isinstance(text, str):
                    kind = type(text).__name__
                    where = f"{file.path}, row {row}: column {source.text_field!r}"
                    yield BadRecord("text is no string", f"{where} is {kind}, expected a string.")
                else:
                    # Dates and the like are no JSON; they are written as Python does.
                    kept = json.loads(json.dumps({name: values[name] for name in source.metadata_fields}, default=str))
                    yield str(own_id) if own_id is not None else f"{file.label}:{row}", text, kept
    except (pa.ArrowException, OSError) as error:
        yield BadRecord("damaged parquet", f"{file.path} is damaged, or is no parquet file: {error}.")


def webdataset_records(file: InputFile, stream: BinaryIO, source: SourceConfig) -> Iterator[Record]:
    """One document a sample: its .txt, or the text field of its .json. Other members are passed over."""
    from pretrain.data.sources.jsonl import json_record

    members = tar_members(stream, str(file.path))
    try:
        for key, group in groupby(members, key=lambda member: _key_and_kind(member)[0]):
            by_kind: dict[str, TarMember] = {_key_and_kind(member)[1]: member for member in group}
            where = f"{file.path}: sample {key}"
            if "txt" in by_kind:
                text = decode_utf8(where, 0, by_kind["txt"].content)
                yield text if isinstance(text, BadRecord) else (key, text)
            elif "json" in by_kind:
                line = decode_utf8(where, 0, by_kind["json"].content)
                yield line if isinstance(line, BadRecord) else json_record(where, key, line, source)
            else:
                kinds = ", ".join(f".{kind}" for kind in by_kind)
                yield BadRecord(
                    "no .txt or .json",
                    f"{where} has {kinds} but no .txt or .json to read text from. Token ids (.npy) are not built from: "
                    "`diptych data index` takes them as they are.",
                )
    except UserError as error:
        yield BadRecord("damaged tar", f"{error}.")


def _key_and_kind(member: TarMember) -> tuple[str, str]:
    """As webdataset splits names: at the first dot of the last part."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, kind = name.partition(".")
    return folder + slash + stem, kind.lower()
