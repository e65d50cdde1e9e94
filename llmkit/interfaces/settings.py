"""The options of a component: a frozen pydantic model that refuses unknown fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Subclass it beside your component; its fields, defaults and bounds become the component's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
