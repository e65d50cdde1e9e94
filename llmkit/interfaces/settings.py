"""The options of a component: a frozen pydantic model that refuses unknown fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """Subclass it beside your component; its fields, defaults and bounds become the component's options.

    An option that is called like a kind of part (`eviction`) takes the name of any registered one, and
    `parts[option][name]()` makes it. What `parts` says in the class itself serves where there is no registry.
    """

    parts: ClassVar[Mapping[str, Mapping[str, Callable[[], Any]]]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Python's True equals 1: `max_num_seqs=true` would run one request at a time."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        kinds = (wanted, *get_args(wanted))
        if isinstance(value, bool) and any(kind in (int, float) or type(kind) is int for kind in kinds):
            raise ValueError("Input should be a number, not true or false")
        return value
