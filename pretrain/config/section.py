"""What every section of the configuration is made of: the base class and the kinds of numbers."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

AbsolutePath = Annotated[Path, AfterValidator(lambda path: Path(path).expanduser().absolute())]
"""A relative path is taken from the working directory of the command, once; the saved config holds it absolute."""
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
OnOff = BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value)
"""For words among which are on and off: YAML 1.1 reads these two, bare, as booleans."""


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
