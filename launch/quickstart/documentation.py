"""Real text that every machine has: the documentation inside the installed Python packages, as JSONL documents.

Sources are parsed, never imported. The same packages give the same bytes.
"""

import ast
import ctypes
import gzip
import hashlib
import json
import multiprocessing
import signal
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from launch.local.ranks import num_cores
from pretrain.files import atomic_path, write_json

SHORTEST_DOCSTRING = 80
"""Characters; what is not longer says little."""
LARGEST_MODULE = 2 * 2**20
"""Bytes; what is larger is generated code."""
NOT_DOCUMENTATION = frozenset({"_vendor", "pretrain", "launch"})
"""Folders left out: vendored copies of other packages, and Diptych itself."""
PR_SET_PDEATHSIG = 1


def python_modules(roots: list[Path] | None = None) -> list[tuple[str, Path]]:
    """Dotted name and file of each module in the environment's package folders, by name."""
    if roots is None:
        roots = sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})
    modules = {}
    for root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if NOT_DOCUMENTATION.isdisjoint(parts) and path.is_file() and path.stat().st_size <= LARGEST_MODULE:
                modules[".".join(parts).removesuffix(".__init__")] = path
    return sorted(modules.items())


def docstrings(path: Path) -> str:
    """The longer docstrings of a module in the order of its source; empty where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(node, ast.get_docstring(node)) for node in ast.walk(tree) if isinstance(node, documented)]
    long = [(getattr(node, "lineno", 0), text) for node, text in found if text and len(text) > SHORTEST_DOCSTRING]
    joined = "\n\n".join(text for _, text in sorted(long))
    return joined.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")


def language_topics() -> Iterator[tuple[str, str]]:
    """Id and text of each page of Python's own language documentation, as `help()` shows it."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"pydoc_data.topics.{name}", text


def collect_documentation(target: Path, report: Callable[[str, int, int], None]) -> bool:
    """Write one JSONL document (id, text) per documented module to `target` (.jsonl.gz), atomically.

    Returns:
        False where `target` was there already, made of the same modules; it is left as it is.
    """
    modules = python_modules()
    inputs = json.dumps([(str(path), path.stat().st_size) for _, path in modules])
    made_of = {"inputs": hashlib.sha256(inputs.encode()).hexdigest()}
    note = target.with_name(target.name.removesuffix(".jsonl.gz") + ".inputs.json")
    if target.is_file() and note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_of:
        return False
    # Not a fork: the progress bar's thread may hold a lock at that moment.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_cores(), context, initializer=_begin_worker)
    try:
        with (
            atomic_path(target) as temporary,
            temporary.open("wb") as raw,
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as file,
        ):
            for name, text in language_topics():
                file.write(_json_line(name, text))
            texts = pool.map(docstrings, [path for _, path in modules], chunksize=32)
            for done, ((name, _), text) in enumerate(zip(modules, texts, strict=True), start=1):
                if text:
                    file.write(_json_line(name, text))
                report("reading modules", done, len(modules))
    finally:
        pool.shutdown(cancel_futures=True)
    write_json(note, made_of)
    return True


def _json_line(name: str, text: str) -> bytes:
    return (json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n").encode()


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
