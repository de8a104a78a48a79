"""Parquet tables: each row is a document, one column of which is its text."""

import json
from collections.abc import Iterator

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import BadRecord, InputFile, Record
from pretrain.errors import UserError

_ROWS_AT_A_TIME = 1024


def parquet_records(file: InputFile, source: SourceConfig) -> Iterator[Record]:
    """Yield the document of each row; only the columns of text, id and metadata are read, some rows at a time.

    Raises:
        UserError: there is no column of one of `source.metadata_fields`.
    """
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
        for batch in table.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
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
