"""JSON lines: each is an object, one field of which is the document's text."""

import json
from collections.abc import Iterator
from io import BufferedReader

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import BadRecord, InputFile, Record
from pretrain.data.sources.unpacking import text_lines


def jsonl_records(file: InputFile, stream: BufferedReader, source: SourceConfig) -> Iterator[Record]:
    """Yield the document of each line that is not blank."""
    for number, _, line in text_lines(file.path, stream):
        if isinstance(line, BadRecord):
            yield line
        elif line.strip():
            yield json_record(f"{file.path}:{number}", f"{file.label}:{number}", line, source)


def json_record(where: str, default_id: str, line: str, source: SourceConfig) -> Record:
    """Return the document of a JSON object; `where` names it in errors."""
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
