"""Which files a source means, and of which format each is."""

import glob
from pathlib import Path

from pretrain.config.data import SourceConfig
from pretrain.data.remote import default_cache, fetch_raw
from pretrain.data.sources.documents import (
    Format,
    InputFile,
)
from pretrain.errors import UserError
from pretrain.redaction import redact

SUFFIXES: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".fasta": "fasta", ".fa": "fasta", ".faa": "fasta"}


SUFFIXES |= {".parquet": "parquet", ".tar": "webdataset"}


_PACKED = (".gz", ".zst")


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
