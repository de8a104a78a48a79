"""Which changes of a config make another run."""

from typing import Any

from pretrain.config.run import RunConfig


def changes(saved: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (saved value, value now) for each leaf that differs."""
    before, after = flatten(saved.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of each leaf of nested dicts."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, child in value.items() for key, leaf in flatten(child, f"{prefix}{name}.").items()}


FALSIFYING = (
    "seed",
    "model.",
    "data.sequence_length",
    "data.packing",
    "data.cut",
    "data.streams",
    "data.mask",
    "data.random_token_share",
    "optimizer.kind",
)
"""Keys (or beginnings of keys) that a resumed run may not change silently: it would be another run."""


def falsifying(differences: dict[str, tuple[Any, Any]]) -> list[str]:
    """Those of the changed keys that would make the resumed run another run."""
    return [key for key in differences if key.startswith(FALSIFYING) and key != "model.kernel"]
