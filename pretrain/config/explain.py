"""Validation errors as answers: the dotted path, the value, what is allowed, the nearest valid key."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from pretrain.config.run import RunConfig
from pretrain.config.section import fields_of, section_in


def explain(problem: Any) -> str:
    """One pydantic error as an answer: path, value, what is allowed, the nearest valid key."""
    path = ".".join(map(str, problem["loc"])) or "config"
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        *inside, wrong = problem["loc"]
        keys = list(fields_of(_section_at(inside)))
        nearest = difflib.get_close_matches(str(wrong), keys, n=1, cutoff=0.5)
        elsewhere = [key for key in _leaves(RunConfig) if key.split(".")[-1] == wrong]
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


def _section_at(path: Sequence[str | int]) -> type[BaseModel] | None:
    """The schema class that the keys of `path` live in."""
    section: type[BaseModel] | None = RunConfig
    for name in path:
        if isinstance(name, str):
            field = fields_of(section).get(name)
            section = section_in(field) if field else None
    return section


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values in a section and in those inside it, lists not entered."""
    for name, field in fields_of(section).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
