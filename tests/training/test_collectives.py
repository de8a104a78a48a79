"""What two ranks tell each other before a step."""

from datetime import timedelta

import torch

from pretrain.batch import Batch
from pretrain.errors import UserError
from pretrain.model.sequence_parallel import SequenceGroup
from pretrain.training.collectives import agree_on_step, any_rank
from tests.ranks import run_on_ranks


def tell(rank):
    ids = torch.full((2, 4), rank + 7)
    labels = torch.where(torch.arange(4) > rank, ids, -100).expand(2, 4)
    documents = torch.tensor([[1, 1, 1, 1], [1, 1, 1, rank]])
    batch = Batch(ids, labels.contiguous(), documents, torch.arange(4).expand(2, 4))
    steps = [agree_on_step(batch, 5 * rank, stop) for stop in (False, rank == 1)]
    return steps, [any_rank(value) for value in (False, rank == 0, rank == 1, True)]


def test_every_rank_knows_the_sums_over_all_and_whether_any_is_asked_to_stop(tmp_path):
    ranks = run_on_ranks(tell, 2, tmp_path / "ranks")
    assert ranks[0] == ranks[1]
    (step, stopping), any_of = ranks[0]
    assert (step.masked, step.tokens, step.samples_lost) == (2 * 3 + 2 * 2, 7 + 8, 5)
    assert (step.stop, stopping.stop) == (False, True)
    assert stopping.rows_checksum == step.rows_checksum > 0
    assert any_of == [False, True, True, True]


def share_rows(rank):
    """Totals of two ranks that share their rows, and the error where these differ."""
    group = SequenceGroup.join(2, timedelta(seconds=60))
    ids = torch.full((3, 4), 7)
    batches = [Batch(ids + change, ids, torch.ones_like(ids), ids) for change in (0, rank)]
    alike = agree_on_step(batches[0], 5, False, group)
    try:
        agree_on_step(batches[1], 5, False, group)
    except UserError as error:
        return alike, str(error)
    return alike, None


def test_rows_that_ranks_share_are_counted_once_and_refused_where_they_differ(tmp_path):
    for alike, error in run_on_ranks(share_rows, 2, tmp_path / "ranks"):
        assert (alike.masked, alike.tokens, alike.samples_lost) == (12, 12, 5)
        assert "a shard was damaged for one rank and whole for another" in error
