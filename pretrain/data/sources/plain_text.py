"""Plain text: a file is one document, or several where a line matches a separator."""

import re
from collections.abc import Iterator
from io import BufferedReader

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import BadRecord, InputFile, Record
from pretrain.data.sources.unpacking import decode_utf8, text_lines
from pretrain.errors import UserError


def text_records(file: InputFile, stream: BufferedReader, source: SourceConfig) -> Iterator[Record]:
    """Yield the whole text, or what begins at each line in which `source.separator` is found.

    Raises:
        UserError: the separator is no regular expression.
    """
    if source.separator is None:
        text = decode_utf8(file.path, 0, stream.read())
        yield text if isinstance(text, BadRecord) else (file.label, text.removeprefix("\ufeff"))
        return
    try:
        pattern = re.compile(source.separator)
    except re.error as error:
        raise UserError(
            f"corpus.sources[].separator = {source.separator!r} is not a regular expression: {error}"
        ) from error
    start, lines, bad = 1, list[str](), None
    for number, _, line in text_lines(file.path, stream):
        if isinstance(line, BadRecord):
            bad = bad or line
            continue
        separates = pattern.search(line.rstrip("\r\n")) is not None
        if separates and (lines or bad):
            yield bad or (f"{file.label}:{start}", "".join(lines))
            start, lines, bad = number, [], None
        if not separates or line.strip():
            lines.append(line)
    yield bad or (f"{file.label}:{start}", "".join(lines))
