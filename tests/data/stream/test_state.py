"""Where a stream stands: what can follow what."""

import numpy as np
import pytest

from pretrain.data.stream.state import StreamState


def state_of(visit: int, row: int, lost: int) -> StreamState:
    """Of two streams, the first of which never moves."""
    visits, rows, losses = np.array([[3, visit], [1, row], [0, lost]])
    return StreamState(0, 0, visits, rows[:, None], losses)


@pytest.mark.parametrize(
    ("visit", "row", "lost", "is_behind"),
    [
        (5, 2, 9, False),  # where it was
        (5, 3, 9, False),
        (6, 0, 9, False),  # a new visit counts its rows anew
        (6, 0, 11, False),  # a damaged shard was passed over, which begins a visit
        (7, 4, 9, False),
        (4, 2, 9, True),
        (5, 1, 9, True),
        (6, 9, 8, True),  # what was lost cannot come back
        (5, 3, 10, True),  # lost samples, and still in the visit whose shard they were in
        (5, 2, 10, True),
    ],
)
def test_a_state_can_follow_one_that_no_stream_is_behind(visit, row, lost, is_behind):
    assert state_of(visit, row, lost).is_behind(state_of(5, 2, 9)) is is_behind
