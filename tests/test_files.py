"""Files that are whole or absent."""

import pytest

from pretrain.files import atomic_path, replace_text, write_text
from tests.disk_calls import disk_calls


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_after(tmp_path):
    with disk_calls() as calls:
        write_text(tmp_path / "file.txt", "text")
    assert calls == ["fsync file.txt.tmp", "rename file.txt.tmp to file.txt", f"fsync {tmp_path.name}"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    write_text(tmp_path / "file.txt", "before")
    with pytest.raises(UnicodeEncodeError), atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_text("half\udcff", encoding="utf-8")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file.txt", "before")]


def test_what_is_of_no_use_after_a_crash_is_not_flushed(tmp_path):
    with disk_calls() as calls:
        replace_text(tmp_path / "file.txt", "text")
    assert calls == ["rename file.txt.tmp to file.txt"]
