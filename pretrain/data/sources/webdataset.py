"""WebDataset tars of text: a sample is the members that share a name but for its endings."""

from collections.abc import Iterator
from io import BufferedReader
from itertools import groupby

from pretrain.config.data import SourceConfig
from pretrain.data.sources.documents import BadRecord, InputFile, Record
from pretrain.data.sources.jsonl import json_record
from pretrain.data.sources.unpacking import decode_utf8
from pretrain.data.tar import TarMember, tar_members
from pretrain.errors import UserError


def webdataset_records(file: InputFile, stream: BufferedReader, source: SourceConfig) -> Iterator[Record]:
    """Yield the document of each sample: its .txt, or the text field of its .json; other members are passed over."""
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
    """Split a name as webdataset does: at the first dot after the last slash."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, kind = name.partition(".")
    return folder + slash + stem, kind.lower()
