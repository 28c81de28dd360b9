"""What every section of a recipe is, and keys with dots."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of a recipe: immutable, nothing unknown in it, no bool where a number is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes`, `no`, `on` and `off` as booleans, and pydantic would take them as 1 and 0.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a yes/no value makes no sense here")
        return value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots: `{"distill": {"steps": 1}}` as `{"distill.steps": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
