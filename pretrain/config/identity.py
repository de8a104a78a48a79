"""What two configs differ in, and which differences make another run."""

from typing import Any

from pydantic import BaseModel

from pretrain.config.run import RunConfig
from pretrain.config.section import ChangeOnResume, fields_of, section_in


def changes(saved: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (saved value, value now) for each leaf that differs; a list is a leaf."""
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


def falsifying(saved: RunConfig, now: RunConfig, tokens_seen: int) -> list[str]:
    """The changed keys that make `now` another run than the saved one, which has seen so many tokens.

    Phases that have not begun may be added, changed and removed: nothing was trained under them.
    """
    refused = [key for key in changes(saved, now) if is_fixed(key)]
    if _phases_begun(saved, tokens_seen) != _phases_begun(now, tokens_seen):
        refused.append("phases")
    return refused


def is_fixed(key: str, section: type[BaseModel] | None = RunConfig) -> bool:
    """Whether the field that a dotted key leads to is `Fixed`, by its own mark or that of the nearest section."""
    fixed = False
    for name in key.split("."):
        field = fields_of(section).get(name)
        if field is None:
            # A key of the user's own, such as a source in data.source_weights.
            break
        marks = [mark for mark in field.metadata if isinstance(mark, ChangeOnResume)]
        fixed = not marks[0].allowed if marks else fixed
        section = section_in(field)
    return fixed


def _phases_begun(config: RunConfig, tokens_seen: int) -> list[dict[str, Any]]:
    """The fixed settings of the phases that some step was trained in."""
    begun = (phase for phase in config.phases if phase.from_tokens < tokens_seen)
    return [{key: value for key, value in phase if is_fixed(key, type(phase))} for phase in begun]
