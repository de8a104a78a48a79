"""Validation errors as answers: the dotted path, the value, what is allowed, the nearest valid key."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.config.run import RunConfig


def _section_at(path: Sequence[str | int]) -> type[BaseModel] | None:
    """The schema class that the keys of `path` live in."""
    section: Any = RunConfig
    for part in path:
        if isinstance(part, int):
            continue
        field = _keys(section).get(part)
        if field is None:
            return None
        section = next((a for a in (field.annotation, *get_args(field.annotation)) if hasattr(a, "model_fields")), None)
        if section is None:
            return None
    return section


def explain(problem: Any) -> str:
    """One pydantic error as an answer: path, value, what is allowed, the nearest valid key."""
    path = ".".join(map(str, problem["loc"])) or "config"
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        section = _section_at(problem["loc"][:-1])
        keys = list(_keys(section)) if section else []
        inside = problem["loc"][:-1]
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), keys, n=1, cutoff=0.5)
        elsewhere = [key for key, _ in _leaves(RunConfig) if key.split(".")[-1] == problem["loc"][-1]]
        if nearest:
            hint = f"did you mean {'.'.join(map(str, (*inside, nearest[0])))}? "
        else:
            hint = f"did you mean {elsewhere[0]}? " if elsewhere else ""
        return f"{path}: unknown key (value {value!r}); {hint}Allowed here: {', '.join(keys)}"
    if problem["type"] == "missing":
        part = "; is this a part of a config? Then include it in one that names a corpus" if path == "corpus" else ""
        return f"{path}: required, but not given{part}"
    if path == "name" and problem["type"].startswith("string_"):
        return f"name: {value!r} cannot name a folder; use up to 100 letters, digits, '.', '_' and '-'"
    if problem["type"] == "literal_error":
        allowed = problem["ctx"]["expected"]
        nearest = difflib.get_close_matches(str(value), allowed.replace("'", "").replace(" or ", ", ").split(", "), n=1)
        return f"{path}: {value!r} is not allowed; allowed: {allowed}" + (f"; nearest: {nearest[0]}" if nearest else "")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" + ("" if isinstance(value, dict | BaseModel) else f" (given: {value!r})")


def _keys(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section, as they are called in a file."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in _keys(section).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
