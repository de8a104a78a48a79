"""The training of a probe: one small encoder from scratch, on one thread of the CPU. A pure function of its seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CURVE_POINTS = 20


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How each encoder of a probe is trained."""

    steps: int
    learning_rate: float
    decay: float
    """Share of the steps, at the end, during which the learning rate falls to zero."""
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises."""
    weight_decay: float = 0.01


def train_probe(
    model: nn.Module, settings: ProbeSettings, forward: Callable[[int], tuple[Tensor, Tensor]]
) -> list[tuple[int, float]]:
    """Train with AdamW, clipping gradients to a norm of 1; the learning rate rises, stays and falls linearly to zero.

    Args:
        model: whose parameters are trained.
        settings: of the training.
        forward: from a step, beginning with 1, to the mean loss of a new batch, and which answers were right, bool.

    Returns:
        (step, share of right answers since the point before), some twenty of them.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, settings))
    points = {round(settings.steps * k / _CURVE_POINTS) for k in range(1, _CURVE_POINTS + 1)}
    curve: list[tuple[int, float]] = []
    right: list[Tensor] = []
    for step in range(1, settings.steps + 1):
        loss, correct = forward(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right.append(correct)
        if step in points:
            curve.append((step, float(torch.cat(right).double().mean())))
            right.clear()
    return curve


def learning_rate_share(step: int, settings: ProbeSettings) -> float:
    """Share of the learning rate at a step, from 0."""
    rising = (step + 1) / max(settings.warmup * settings.steps, 1)
    falling = (settings.steps - step) / max(settings.decay * settings.steps, 1)
    return min(1.0, rising, falling)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Compute on one thread, so that sums come in one order; weights are drawn from `seed`.

    So small an encoder gains nothing by a second thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
