"""What the sections of a recipe share, and dotted keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of a recipe: immutable, without unknown keys, and without booleans where a number is expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes`, `no`, `on` and `off` as booleans, and pydantic would take them as 1 and 0.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be a yes/no value")
        return value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested keys with dots: `{"distill": {"steps": 1}}` as `{"distill.steps": 1}`."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return dotted
