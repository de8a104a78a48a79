"""`diptych ladder`: the same recipe at several sizes, and what its losses say of the next size. A ladder is a sweep.

runs/LADDER/
  sweep.json, SIZE-seedN/   see members.py
  ladder.json               the rungs: what each costs, and what the next one would
  ladder.md, ladder.png     what came out; see ladder_report.py
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.grid.members import SEED, Point, Sweep, override, sweep_over
from launch.preparation import vocabulary_of
from pretrain.config.load import config_folder, find_config, load_config, settings_in
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.files import write_json
from pretrain.model.summary import summarize
from pretrain.training.cost.flops import flops_per_token

LADDER = "ladder.json"
SIZE = "size"
"""The axis of a ladder."""
FEWEST_STEPS = 20
"""A rung of fewer optimizer steps teaches nothing."""
SEARCHED = "model"
"""Folder of configs in which a size is looked for by name."""


@dataclass(frozen=True)
class Rung:
    """A size, and what one training of it costs."""

    size: str
    parameters: int
    tokens: int
    flops: float
    """FLOPs of one training, with triangles counted as triangles."""


@dataclass(frozen=True)
class Ladder:
    """Rungs from the smallest on."""

    rungs: list[Rung]
    next_rung: Rung | None
    """What the prediction is for: trained on as many tokens per parameter. None if no larger size is known."""
    tokens_per_parameter: float

    def write(self, folder: Path) -> None:
        """Write ladder.json beside sweep.json."""
        write_json(folder / LADDER, {"format": 1, **asdict(self)})


def read_ladder(folder: Path) -> Ladder:
    """What `Ladder.write` wrote.

    Raises:
        UserError: this is no ladder.
    """
    try:
        content = json.loads((folder / LADDER).read_bytes())
        following = content["next_rung"]
        return Ladder(
            [Rung(**rung) for rung in content["rungs"]],
            Rung(**following) if following else None,
            content["tokens_per_parameter"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no ladder: it has no readable {LADDER}") from error


@dataclass(frozen=True)
class _Size:
    """A size of the config: its settings, and its cost."""

    name: str
    overrides: tuple[str, ...]
    config: RunConfig
    parameters: int
    flops_per_token: float

    def rung(self, tokens_per_parameter: float) -> Rung:
        tokens = round(tokens_per_parameter * self.parameters)
        return Rung(self.name, self.parameters, tokens, tokens * self.flops_per_token)


def plan_ladder(
    config_name: str,
    overrides: Sequence[str],
    sizes: Sequence[str],
    *,
    seeds: Sequence[int],
    tokens_per_parameter: float = 20.0,
    budget: float | None = None,
) -> tuple[Sweep, Ladder]:
    """Make the runs of a ladder.

    Every size is trained on the same number of tokens per parameter (20 of them: Hoffmann et al., arXiv 2203.15556).

    Args:
        config_name: what all sizes share.
        overrides: KEY=VALUE changes to it.
        sizes: names of `configs/model/`, or config files; their settings overrule the config's.
        seeds: of which each size is trained with every one.
        tokens_per_parameter: how long.
        budget: FLOPs of all trainings together, which decides how long instead.

    Raises:
        UserError: fewer than two sizes, one that does not exist, two of one size, or too few tokens for some size.
    """
    found = sorted((_size(config_name, overrides, name) for name in sizes), key=lambda size: size.parameters)
    if len(found) < 2 or len({size.name for size in found}) < len(found):
        raise UserError(f"a ladder needs several different sizes, such as --sizes 1m,4m,15m; given: {', '.join(sizes)}")
    if budget is not None:
        per_token = sum(size.flops_per_token * size.parameters for size in found) * len(seeds)
        tokens_per_parameter = budget / per_token
    rungs = [size.rung(tokens_per_parameter) for size in found]
    for size, rung in zip(found, rungs, strict=True):
        _check_length(size, rung, tokens_per_parameter)
    points = [
        Point(rung.size, (*size.overrides, f"training.tokens={rung.tokens}"))
        for size, rung in zip(found, rungs, strict=True)
    ]
    axes = {SIZE: points, SEED: [Point(str(seed), (f"seed={seed}",)) for seed in seeds]}
    larger = _next_size(config_name, overrides, found[-1].parameters)
    ladder = Ladder(rungs, larger.rung(tokens_per_parameter) if larger else None, tokens_per_parameter)
    return sweep_over(config_name, overrides, axes), ladder


def _size(config_name: str, overrides: Sequence[str], name: str) -> _Size:
    path = find_config(name if _is_path(name) else f"{SEARCHED}/{name}")
    own = tuple(override(key, value) for key, value in settings_in(path).items())
    config = load_config(config_name, [*overrides, *own])
    vocab_size, _ = vocabulary_of(config)
    flops = flops_per_token(config.model, vocab_size, config.data.sequence_length)
    parameters = sum(group.parameters for group in summarize(config.model, vocab_size).groups)
    return _Size(path.stem, own, config, parameters, flops.total(config.data.mask_rate))


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(".yaml")


def _check_length(size: _Size, rung: Rung, tokens_per_parameter: float) -> None:
    step = size.config.training.batch_size * size.config.data.sequence_length
    if rung.tokens < FEWEST_STEPS * step:
        raise UserError(
            f"{rung.size} would be trained on {rung.tokens:,} tokens ({tokens_per_parameter:.3g} per parameter), fewer "
            f"than {FEWEST_STEPS} steps of up to {step:,}; raise --budget or --tokens-per-parameter, or leave "
            f"{rung.size} out"
        )


def _next_size(config_name: str, overrides: Sequence[str], parameters: int) -> _Size | None:
    """The smallest of the sizes that come with Diptych that has half as many parameters again, or more."""
    shapes = {}
    for path in (config_folder() / SEARCHED).glob("*.yaml"):
        settings = settings_in(path)
        if "model.hidden_size" in settings and "model.num_layers" in settings:
            shapes[path.stem] = settings["model.num_layers"] * settings["model.hidden_size"] ** 2
    for name in sorted(shapes, key=shapes.__getitem__):
        if (size := _size(config_name, overrides, name)).parameters >= 1.5 * parameters:
            return size
    return None
