"""What every section of the configuration is made of: the base class, kinds of values, and how a schema is walked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

_T = TypeVar("_T")
AbsolutePath = Annotated[Path, AfterValidator(lambda path: Path(path).expanduser().absolute())]
"""A relative path is taken from the working directory of the command, once; the saved config holds it absolute."""
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
OnOff = BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value)
"""Reader of words among which are on and off: YAML 1.1 takes these two, bare, for booleans."""


@dataclass(frozen=True)
class ChangeOnResume:
    """A field's marker: whether a run that is resumed with another value is still the same run."""

    allowed: bool


Fixed = Annotated[_T, ChangeOnResume(allowed=False)]
"""A setting, or a section of them, that makes a run what it is: with another value it is another run."""
Free = Annotated[_T, ChangeOnResume(allowed=True)]
"""A setting inside a `Fixed` section that may change all the same."""


class Section(BaseModel):
    """Frozen, finite, without unknown keys; the docstring under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )

    def changed(self, values: dict[str, Any]) -> Self:
        """The section with some values changed.

        Raises:
            ValidationError: a value is not allowed, or does not go with the rest.
        """
        return self.model_validate(self.model_dump() | values)


def fields_of(section: type[BaseModel] | None) -> dict[str, FieldInfo]:
    """Name in a config file -> field; empty for None."""
    return {} if section is None else {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or that each item of its list is; None if it holds a plain value."""
    held = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in held if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
