"""`make mutate` on a product of one file, of which its test knows one half."""

import subprocess
from pathlib import Path

import pytest

from tests import mutate

SOURCE = '''"""A room."""

def known(number: int) -> bool:
    """Whether it is large."""
    return number > 10

def unknown(number: int) -> int:
    number += 1
    return max(number, 3, key=abs)
'''

TEST = """from pretrain.room.file import known

def test_known():
    assert (known(10), known(11), known(12)) == (False, True, True)
"""


PYTEST = "[pytest]\nmarkers = slow\npythonpath = .\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "a checkout"
    files = {"pretrain/room/file.py": SOURCE, "tests/room/test_file.py": TEST, "pytest.ini": PYTEST}
    for name, text in {**files, "pretrain/__init__.py": "", "pretrain/room/__init__.py": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    monkeypatch.setattr(mutate, "CHECKOUT", folder)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a second each time, for hypothesis
    return folder


def test_what_the_tests_of_a_room_do_not_notice_is_shown_and_the_checkout_stays_as_it_is(checkout, capsys):
    room = Path("pretrain/room")
    ends = mutate.try_mutations(mutate.draw(room, 100, seed=0), mutate.tests_of(room))
    printed = capsys.readouterr().out
    assert (checkout / "pretrain/room/file.py").read_text() == SOURCE
    assert ends == {"killed": 3, "survived": 5}
    for line in (
        "killed   pretrain/room/file.py:5 comparison FAILED tests/room/test_file.py::test_known\n"
        "    -    return number > 10\n    +    return number >= 10\n",
        "+    return number > 11\n",
        "survived pretrain/room/file.py:8 statement dropped \n    -    number += 1\n    +    pass\n",
        "survived pretrain/room/file.py:9 keyword dropped \n",
    ):
        assert line in printed
    assert mutate.draw(room, 3, seed=5) == mutate.draw(room, 3, seed=5) != mutate.draw(room, 3, seed=6)


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a = x[0] < 3 and not b", {"(x[0] < 3 or not b)", "x[1] < 3", "x[0] < 4", "x[0] <= 3", "and (b)"}),
        ("f'{a + 1}'", set()),
        ("log.info('é %d', 1)", set()),
        ("@cache(size=1)\ndef f(x: Literal[1]): ...", set()),
        ("raise ValueError(1)", {"pass"}),
        ("é = 'é'; o.x = b + 1", {"pass", "o.x = (b - 1)", "o.x = b + 2"}),
        ("f(\n  a,\n  b=True,\n)", {"f(a)", "b=False", "pass"}),
    ],
)
def test_one_thing_is_changed_at_a_time(tmp_path, monkeypatch, source, changed):
    monkeypatch.setattr(mutate, "CHECKOUT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text(source + "\n")
    found = [mutation.after for mutation in mutate.mutations(path)]
    assert len(found) == len(changed)
    assert all(any(part in after for after in found) for part in changed)


def test_a_room_is_tried_by_the_tests_that_lie_as_it_does():
    assert "tests/data/stream/test_packing.py" in mutate.tests_of(Path("pretrain/data/stream"))
    assert "tests/launch/slurm/test_queueing.py" in mutate.tests_of(Path("launch/slurm"))
    assert "tests/training/test_guards.py" in mutate.tests_of(Path("pretrain/training/guards.py"))
    assert not any("cost" in path for path in mutate.tests_of(Path("pretrain/training/guards.py")))
