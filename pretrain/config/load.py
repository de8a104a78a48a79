"""Files -> `RunConfig`: includes, the file, KEY=VALUE overrides, validation. Opens no corpus, imports no torch."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from pretrain.config.explain import explain
from pretrain.config.identity import flatten
from pretrain.config.run import RunConfig
from pretrain.errors import UserError


def config_folder() -> Path:
    """The folder of the configs that come with Diptych: inside the wheel, or `configs/` of a checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def find_config(name: str, beside: Path | None = None) -> Path:
    """A config file by path (from the working directory or `beside`) or by its name among the packaged ones.

    Raises:
        UserError: if there is no such file; lists what there is.
    """
    folders = ([beside] if beside else []) + [Path.cwd(), config_folder(), config_folder().parent]
    candidates = [folder / file for folder in folders for file in (name, f"{name}.yaml")]
    for path in candidates:
        if path.is_file():
            return path.absolute()
    packaged = sorted(str(p.relative_to(config_folder()).with_suffix("")) for p in config_folder().rglob("*.yaml"))
    nearest = [path for path in packaged if path.split("/")[-1] == name] or difflib.get_close_matches(name, packaged, 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"no config {name!r}: neither a file nor one of {', '.join(packaged)}{hint}")


def _merge_file(path: Path, including: tuple[Path, ...] = ()) -> DictConfig:
    if path in including:
        raise UserError(f"{path} includes itself, by way of {' -> '.join(p.name for p in (*including, path))}")
    try:
        content = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: expected `key: value` lines at the top, found {type(content).__name__}")
    includes = content.pop("include", [])
    parts = [_merge_file(find_config(name, beside=path.parent), (*including, path)) for name in includes]
    merged = OmegaConf.merge(*parts, content)
    assert isinstance(merged, DictConfig)
    return merged


def load_config(
    name: str, overrides: Sequence[str] = (), *, beneath: Mapping[str, Any] = MappingProxyType({})
) -> RunConfig:
    """Merge includes, then the file, then `KEY=VALUE` overrides, and validate.

    `beneath` is what holds where all of these say nothing, for what needs a part of a run only.

    Raises:
        UserError: naming each wrong path, its value, what is allowed and the nearest valid key.
    """
    path = find_config(name)
    content = OmegaConf.merge(dict(beneath), _merge_file(path))
    assert isinstance(content, DictConfig)
    content.setdefault("name", path.stem)
    try:
        for override in overrides:
            key, separator, _ = override.partition("=")
            if not separator:
                raise UserError(f"{override!r} is not KEY=VALUE, for instance training.tokens=1000000")
            OmegaConf.update(content, key, OmegaConf.select(OmegaConf.from_dotlist([override]), key), force_add=True)
        values = OmegaConf.to_container(content, resolve=True)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: {error}") from error
    return validate(values, f"{path} with {' '.join(overrides)}" if 0 < len(overrides) < 4 else str(path))


def settings_in(path: Path) -> dict[str, Any]:
    """Dotted key -> value of what a config file and its includes set, not validated.

    Raises:
        UserError: if it is not readable.
    """
    return flatten(OmegaConf.to_container(_merge_file(path)))


def validate(values: Any, origin: str) -> RunConfig:
    """Check plain values against the schema; `origin` names them in the error."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {explain(problem)}" for problem in error.errors())
        raise UserError(f"{origin} is not a valid run:\n{problems}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back to the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(config.model_dump_json())))
