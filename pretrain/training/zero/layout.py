"""Where ZeRO's flat tensors hold what."""

from torch import Tensor


def place_in(view: Tensor, flat: list[Tensor]) -> tuple[int, int]:
    """In which of the flat tensors a view of one begins, and where."""
    for number, tensor in enumerate(flat):
        offset = int(view.storage_offset() - tensor.storage_offset())
        shared = view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if shared and 0 <= offset < tensor.numel():
            return number, offset
    raise AssertionError("a fragment of a parameter is in none of ZeRO's flat tensors")
