"""What the curve says, in numbers and a sentence: how far the loss is held, and how far more context lowers it."""

import math
from collections.abc import Callable, Sequence

from pretrain.evaluation.report.schema import LengthResult

HELD_WITHIN = 0.01
"""A loss is held if it is no more than this share above that at the training length."""

LITTLE_LEARNED = 0.95
"""A loss at 1x above this share of that of token frequencies alone is cautioned against."""

FEW_DOCUMENTS = 20
"""Fewer than these are cautioned against: the spread between them is hardly known, and resampling cannot add to it."""


def held_multiple(results: Sequence[LengthResult]) -> float:
    """The longest length up to which the loss is held; see `loss_is_held`."""
    return _last_of_run([r for r in results if r.multiple >= 1], loss_is_held)


def effective_multiple(results: Sequence[LengthResult]) -> float:
    """The longest length up to which, on the way as well, the loss is held and the gain is surely above zero."""
    return _last_of_run([r for r in results if r.multiple >= 1], lambda r: loss_is_held(r) and r.gain_interval[0] > 0)


def used_multiple(results: Sequence[LengthResult]) -> float:
    """The longest length up to which each is surely better than the one before it."""
    return _last_of_run(
        [r for r in results if r.multiple >= 1],
        lambda r: r.step_gain_interval is not None and r.step_gain_interval[0] > 0,
    )


def loss_is_held(result: LengthResult) -> bool:
    """Whether the loss is no worse than at 1x: within 1 %, or within the interval of the difference."""
    base = result.loss + result.gain
    return result.loss <= (1 + HELD_WITHIN) * base or result.gain_interval[1] >= 0


def _last_of_run(results: Sequence[LengthResult], good: Callable[[LengthResult], bool]) -> float:
    """The multiple of the last of the results after the first that are all good; of the first if the second is not."""
    last = results[0].multiple
    for result in results[1:]:
        if not good(result):
            break
        last = result.multiple
    return last


def headline(results: Sequence[LengthResult]) -> str:
    """The answer in a sentence or two."""
    held, effective = held_multiple(results), effective_multiple(results)
    by_multiple = {r.multiple: r for r in results}
    base = by_multiple[1.0].length
    if not any(r.multiple > 1 for r in results):
        return (
            f"Nothing beyond the training length of {base} tokens was measured; what was left out is listed with why."
        )
    if effective > 1:
        r = by_multiple[effective]
        text = (
            f"Effective length {effective:g}x, {r.length:,} tokens: up to there the loss is held, and what lies beyond "
            f"the {base} tokens of the training lowers it, by {r.gain:.3f} nats at {effective:g}x "
            f"({r.gain_interval[0]:.3f} to {r.gain_interval[1]:.3f})."
        )
        used = used_multiple(results)
        if used < effective:
            text += f" But beyond {used:g}x a longer window gains nothing over a shorter one."
    else:
        first = min(m for m in by_multiple if m > 1)
        text = (
            f"No extension: beyond the {base} tokens of the training, more context does not lower the loss at "
            f"{2.0 if 2.0 in by_multiple else first:g}x."
        )
    longest = results[-1]
    if held == longest.multiple:
        return f"{text} The loss is held up to {held:g}x, the longest length measured."
    worse = math.exp(longest.loss - by_multiple[1.0].loss)
    at = f"at {longest.multiple:g}x perplexity is {worse:.2f} times that at 1x"
    return f"{text} The loss is held up to {held:g}x; {at}."


def cautions(results: Sequence[LengthResult], documents: int, unigram_loss: float) -> list[str]:
    """Sentences against reading too much into a headline.

    Args:
        results: by length.
        documents: that the windows come from.
        unigram_loss: nats per target of a model that knows only how often each token occurs.
    """
    found, base = [], next(r for r in results if r.multiple == 1)
    if base.loss > LITTLE_LEARNED * unigram_loss:
        found.append(
            f"Caution: at 1x the loss is {base.loss:.3f}, and token frequencies alone cost {unigram_loss:.3f}: this "
            "encoder has learned little yet, and may read otherwise once it has."
        )
    if documents < FEW_DOCUMENTS:
        found.append(f"Caution: all windows come from {documents} documents; intervals over so few are too narrow.")
    return found
