"""The options of a component: a frozen pydantic model that refuses unknown fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Subclass it beside your component; its fields, defaults and bounds become the component's options.

    An option that is called like a kind of part (`eviction`) takes the name of any registered one, and
    `parts[option][name]()` makes it. What `parts` says in the class itself serves where there is no registry.
    """

    parts: ClassVar[Mapping[str, Mapping[str, Callable[[], Any]]]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
