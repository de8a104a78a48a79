"""The quickstart's documents."""

import gzip
import json
from pathlib import Path

import pytest

from launch.quickstart import documentation
from launch.quickstart.documentation import collect_documentation, docstrings, python_modules

LONG = "A docstring that says something worth reading, in more than eighty characters altogether. "


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A package folder with good, bad and unwanted modules."""
    root = tmp_path / "site packages"
    for name, content in {
        "good/__init__.py": f'"""{LONG}The package."""\nraise SystemExit("imported!")\n',
        "good/part.py": f'class C:\n    """{LONG}C."""\n    def g(self):\n        """{LONG}g."""\ndef f():\n    ""\n',
        "good/_vendor/copy.py": f'"""{LONG}"""\n',
        "broken.py": "def (:\n",
        "silent.py": "x = 1\n",
        "pretrain/own.py": f'"""{LONG}"""\n',
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "latin.py").write_bytes(b'"""caf\xe9 ' + LONG.encode() + b'"""\n')
    return root


def read(path: Path) -> dict[str, str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {record["id"]: record["text"] for record in map(json.loads, file)}


def test_modules_are_named_by_their_import_path_and_copies_are_left_out(packages):
    assert [name for name, _ in python_modules([packages])] == ["broken", "good", "good.part", "latin", "silent"]


def test_long_docstrings_are_joined_in_the_order_of_the_source(packages):
    assert docstrings(packages / "good" / "part.py") == f"{LONG}C.\n\n{LONG}g."
    assert docstrings(packages / "broken.py") == docstrings(packages / "latin.py") == ""


def test_the_documents_are_the_same_each_time_and_not_collected_twice(packages, tmp_path, monkeypatch):
    modules = python_modules([packages])
    monkeypatch.setattr(documentation, "python_modules", lambda: modules)
    target = tmp_path / "new" / "documents.jsonl.gz"
    seen = []
    assert collect_documentation(target, lambda *progress: seen.append(progress))
    assert seen[-1] == ("reading modules", 5, 5)
    first = target.read_bytes()
    documents = read(target)
    assert documents["good"] == f"{LONG}The package."
    assert "silent" not in documents
    assert len(documents["pydoc_data.topics.lambda"]) > 100

    assert not collect_documentation(target, lambda *_: None)
    target.unlink()
    assert collect_documentation(target, lambda *_: None)
    assert target.read_bytes() == first

    (packages / "silent.py").write_text(f'"""{LONG}No longer."""\n')
    assert collect_documentation(target, lambda *_: None)
    assert "silent" in read(target)
