"""Tensors in files: they hold their values and leave nothing behind, and a folder that will not do is told."""

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from pretrain.errors import UserError
from pretrain.training.zero.file_tensors import TensorFiles, filesystem_of


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of files that were taken at once."""
    sizes = []
    allocate = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda *a: sizes.append(a[2]) or allocate(*a))
    return sizes


def test_a_tensor_in_a_file_is_a_tensor_with_its_blocks_on_the_disk_and_no_name(tmp_path, allocated):
    files = TensorFiles(str(tmp_path))
    zeros = files.zeros_like(torch.empty(3, 1000, device="meta"))
    assert (zeros.dtype, zeros.shape, zeros.count_nonzero()) == (torch.float32, (3, 1000), 0)
    assert files.zeros_like(torch.empty(0)).shape == (0,)
    values = torch.randn(1000)
    moved = files.copy_of(values)
    assert allocated == [12_000, 4_000]
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert moved.data_ptr() != values.data_ptr()
    torch.testing.assert_close(moved.mul_(2), values * 2, rtol=0, atol=0)
    files.flush()


def test_values_that_the_disk_has_lost_are_told(tmp_path, monkeypatch):
    class Lost(mmap.mmap):
        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(mmap, "mmap", Lost)
    files = TensorFiles(str(tmp_path))
    files.zeros_like(torch.empty(8))
    with pytest.raises(
        OSError, match=r"failed to keep values, which are lost: Input/output error; choose another disk"
    ):
        files.flush()


def test_a_folder_without_room_or_that_is_not_there_is_an_answer(tmp_path, monkeypatch):
    one = torch.empty(8)
    with pytest.raises(UserError, match=r"GiB free, and a tensor of 4,194,304\.0 GiB is to go there"):
        TensorFiles(str(tmp_path)).zeros_like(torch.empty(2**50, device="meta"))
    with pytest.raises(UserError, match=r"missing on .* cannot be used: No such file or directory"):
        TensorFiles(str(tmp_path / "missing")).zeros_like(one)
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path))
    assert TensorFiles("$LOCAL_DISK/x").folder == tmp_path / "x"
    monkeypatch.delenv("LOCAL_DISK")
    with pytest.raises(UserError, match="names a variable that is not set"):
        TensorFiles("$LOCAL_DISK/x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="cannot be used: No space left on device"):
        TensorFiles(str(tmp_path)).zeros_like(one)


@pytest.mark.skipif(filesystem_of(Path("/dev/shm")) != "tmpfs", reason="/dev/shm is no tmpfs here")
def test_a_folder_that_is_itself_in_memory_is_warned_of(caplog):
    TensorFiles("/dev/shm")
    assert "is itself in memory" in caplog.text
