"""The engine on two real ranks, at every sharding, beside plain torch on one."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config.load import validate
from pretrain.config.run import RunConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from tests.ranks import run_on_ranks

VOCAB, LENGTH, ROWS, RANKS = 60, 16, 4, 2
SHARDINGS = ("none", "optimizer", "gradients", "full")


def config_of(sharding: str) -> RunConfig:
    model = {"hidden_size": 40, "num_heads": 2, "num_layers": 1, "tie_embeddings": False}
    training = {"sharding": sharding, "precision": "fp32", "batch_size": ROWS * RANKS, "micro_batch_size": ROWS // 2}
    values = {"name": "x", "corpus": {"path": "none"}, "data": {"sequence_length": LENGTH}, "model": model}
    return validate({**values, "training": training, "optimizer": {"clip_grad_norm": 0.1}}, "test")


def model_of(config: RunConfig) -> MaskedLanguageModel:
    torch.manual_seed(3)
    return MaskedLanguageModel(config.model, VOCAB)


def rows_of(step: int) -> Batch:
    """Rows of all ranks, which have different numbers of masked positions."""
    ids = torch.randint(VOCAB, (ROWS * RANKS, LENGTH), generator=torch.Generator().manual_seed(step))
    labels = torch.where(torch.arange(ROWS * RANKS)[:, None] + ids > 40, ids, -100)
    return Batch(ids, labels, torch.ones_like(ids), torch.arange(LENGTH).expand_as(ids))


def loss_of(forward: Callable[[Batch, AttentionLayout], tuple[Tensor, Tensor]], rows: Batch) -> Tensor:
    """Nats per masked position."""
    return forward(rows, AttentionLayout.from_batch(rows))[0].mean()


def reference() -> list[float]:
    """Gradient norms of two steps, and the loss after them."""
    config = config_of("none")
    model, norms = model_of(config), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=config.optimizer.betas, weight_decay=0)
    for step in range(2):
        model.zero_grad()
        loss_of(model, rows_of(step)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
    return [*norms, float(loss_of(model, rows_of(9)).detach())]


def train_at_every_sharding(rank):
    """By sharding: norms and loss as `reference`; what a step that is not finite changes; the loss of new weights."""
    from pretrain.training.collectives import agree_on_step
    from pretrain.training.step import train_step
    from pretrain.training.zero.engine import Engine

    found = {}
    for sharding in SHARDINGS:
        config = config_of(sharding)
        engine = Engine(model_of(config), config, RANKS, torch.device("cpu"))
        engine.set_learning_rate(1e-2)
        for group in engine.torch_optimizer.param_groups:
            group["weight_decay"] = 0.0
        own = [list(rows_of(step).split(ROWS))[rank] for step in range(3)]
        norms = [train_step(engine, rows, agree_on_step(rows, 0, False)).grad_norm for rows in own[:2]]
        told = [*norms, float(loss_of(engine.forward, rows_of(9)).detach())]
        for micro_batch in own[2].split(ROWS // 2):
            engine.backward(engine.forward(*engine.place(micro_batch))[0].sum() * (math.nan if rank else 1.0))
            engine.step()
        skipped = (
            math.isfinite(engine.grad_norm),
            engine.optimizer_steps,
            float(loss_of(engine.forward, rows_of(9)).detach()),
        )
        train_step(engine, own[0], agree_on_step(own[0], 0, False))
        for fragment in engine.partition.weights():
            fragment.tensor.zero_()
        engine.partition.refresh_weights()
        found[sharding] = told, skipped, engine.optimizer_steps, float(loss_of(engine.forward, rows_of(9)).detach())
    return found


def test_two_ranks_train_as_plain_torch_does_skip_what_is_not_finite_and_compute_with_weights_that_were_set(tmp_path):
    expected = reference()
    for found in run_on_ranks(train_at_every_sharding, RANKS, tmp_path / "ranks"):
        for sharding, (told, skipped, steps, of_zeros) in found.items():
            assert told == pytest.approx(expected, rel=1e-4), sharding
            assert skipped == (False, 2, told[-1]), sharding
            assert steps == 3
            assert of_zeros == pytest.approx(math.log(VOCAB)), sharding


def compiler_after(rank):
    from pretrain.training.zero.engine import Engine

    for sharding in SHARDINGS:
        config = config_of(sharding)
        Engine(model_of(config), config, 1, torch.device("cpu"))
    return "torch._inductor.compile_fx" in sys.modules


def test_an_engine_that_compiles_nothing_does_not_wait_for_torchs_compiler(tmp_path):
    assert run_on_ranks(compiler_after, 1, tmp_path / "ranks") == [False]
