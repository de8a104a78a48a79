"""Tensors in files: they hold their values and leave nothing behind, and a folder that will not do is told."""

import shutil

import pytest
import torch

from pretrain.errors import UserError
from pretrain.training.file_tensors import in_file, zeros_in_file


def used(folder) -> int:
    return shutil.disk_usage(folder).used


def test_a_tensor_in_a_file_is_a_tensor_with_its_blocks_on_the_disk_and_no_name(tmp_path):
    before = used(tmp_path)
    zeros = zeros_in_file(torch.empty(3, 2**22, device="meta"), tmp_path)
    assert (zeros.dtype, zeros.shape, zeros.count_nonzero()) == (torch.float32, (3, 2**22), 0)
    assert used(tmp_path) - before > 2**25  # of 48 MiB; others may write there too
    assert not list(tmp_path.iterdir())
    values = torch.randn(1000)
    moved = in_file(values, tmp_path)
    assert moved.data_ptr() != values.data_ptr()
    torch.testing.assert_close(moved.mul_(2), values * 2, rtol=0, atol=0)


def test_a_folder_without_room_or_that_is_not_there_is_an_answer(tmp_path):
    with pytest.raises(UserError, match=r"GiB free, and a tensor of 4,096\.0 GiB is to go there"):
        zeros_in_file(torch.empty(2**40, device="meta"), tmp_path)
    with pytest.raises(UserError, match=r"missing on .* cannot be used: No such file or directory"):
        zeros_in_file(torch.empty(8), tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        zeros_in_file(torch.empty(8), tmp_path / "file")
