"""What two ranks tell each other before a step."""

import torch

from pretrain.batch import Batch
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
