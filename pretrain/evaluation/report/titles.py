"""Names of interventions: in files, and for people. What they do to an encoder is in context/interventions.py."""

from typing import Literal

Intervention = Literal[
    "plain",
    "interpolation",
    "ntk",
    "dynamic_ntk",
    "yarn",
    "dropped",
    "log_length",
    "windowed",
    "without_past",
    "without_future",
]
"""A way to read rows that touches no weight, or an encoder with one triangle off; `plain` is the encoder as trained."""

INTERVENTION_TITLES: dict[str, str] = {
    "plain": "as trained",
    "interpolation": "position interpolation",
    "ntk": "NTK-aware",
    "dynamic_ntk": "dynamic NTK",
    "yarn": "YaRN",
    "dropped": "positions dropped",
    "log_length": "scores scaled by log length",
    "windowed": "windowed to the training length",
    "without_past": "without the past triangle",
    "without_future": "without the future triangle",
}

INTERVENTION_MEANINGS: dict[str, str] = {
    "interpolation": "positions divided by the factor (arXiv 2306.15595)",
    "ntk": "the rotary base raised, so that only low frequencies slow down (arXiv 2309.00071, 3.1)",
    "dynamic_ntk": "the same, by each row's own length (arXiv 2309.00071, 3.3)",
    "yarn": "interpolation of low frequencies only, and sharper attention (arXiv 2309.00071)",
    "dropped": "no rotary positions at all (arXiv 2512.12167, there after a recalibration)",
    "log_length": "scores multiplied by log n / log n_train beyond the training length (arXiv 2202.12172)",
    "windowed": "no triangle reaches further than the training length",
}


def title_of(name: str) -> str:
    """Return an intervention's title; anything else stays as it is."""
    return INTERVENTION_TITLES.get(name, name)
