"""Which files a source means, and of which format each is."""

import glob
import hashlib
import shutil
from pathlib import Path

from pretrain.config.data import SourceConfig
from pretrain.data.fetching import FetchRule, NotThereError, default_cache, fetch, file_system
from pretrain.data.sources.documents import Format, InputFile
from pretrain.errors import UserError
from pretrain.redaction import redact

_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".fasta": "fasta",
    ".fa": "fasta",
    ".faa": "fasta",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_PACKED = (".gz", ".zst")


def source_name(source: SourceConfig) -> str:
    """Return what the corpus calls the source."""
    return source.name or redact(Path(source.path).name)


def find_inputs(source: SourceConfig) -> list[InputFile]:
    """Return the files of a source, sorted by path; those of a URL are fetched once.

    Raises:
        UserError: nothing matches the path, a URL cannot be reached, or the format cannot be told from a file's name.
    """
    if "://" in source.path:
        return [InputFile(p, p.name, _format_of(source, p)) for p in _fetched(source.path, default_cache())]
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
        accepted = ", ".join(s for s, f in _FORMATS.items() if source.format in ("auto", f))
        inside = f"a folder without {accepted} files (or .gz or .zst of them)" if place.is_dir() else "nothing there"
        raise UserError(
            f"source {source.path!r} matches no file ({inside}); "
            "set corpus.sources[].path to a file, a folder or a glob (relative to the working directory)"
        )
    return [InputFile(p, p.relative_to(root).as_posix(), _format_of(source, p)) for p in sorted(paths)]


def _fetched(url: str, cache: Path) -> list[Path]:
    """Return the files that a URL (or, but for http, a pattern) names, fetched once into `cache`."""
    folder = cache / "raw" / hashlib.sha256(url.encode()).hexdigest()[:16]
    urls = [url]
    if not url.startswith(("http://", "https://")):
        system, pattern = file_system(url)
        urls = [system.unstrip_protocol(found) for found in sorted(system.glob(pattern))]
    paths = [folder / each.split("?")[0].rstrip("/").rpartition("/")[2] for each in urls]
    try:
        for each, path in zip(urls, paths, strict=True):
            if not path.is_file():
                fetch(each, path, FetchRule())
    except NotThereError as error:
        raise UserError(f"source {url!r} cannot be read: {error}") from error
    if not paths:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"source {url!r} matches no file")
    return paths


def _is_hidden(relative: Path) -> bool:
    return any(name.startswith(".") for name in relative.parts)


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that a file or glob lies in: all before the first name with a wildcard."""
    if pattern.is_file():
        return pattern.parent
    names = pattern.parts
    wild = next((i for i, name in enumerate(names) if glob.has_magic(name)), len(names) - 1)
    return Path(*names[:wild])


def _known_format(path: Path) -> Format | None:
    return _FORMATS.get(Path(path.stem if path.suffix in _PACKED else path.name).suffix)


def _accepts(source: SourceConfig, path: Path) -> bool:
    known = _known_format(path)
    return known is not None and source.format in ("auto", known)


def _format_of(source: SourceConfig, path: Path) -> Format:
    if source.format != "auto":
        return source.format
    known = _known_format(path)
    if known is None:
        raise UserError(
            f"cannot tell the format of {path} from its name (known: {', '.join(_FORMATS)}, with .gz or .zst too); set "
            "corpus.sources[].format to text, jsonl, fasta, parquet or webdataset, or narrow corpus.sources[].path"
        )
    return known
