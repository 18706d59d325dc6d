"""What every configuration model shares."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Frozen"]


class Frozen(BaseModel):
    """A value: immutable, hashable where its fields are, and intolerant of keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __hash__(self) -> int:
        """Every field is itself a value, so equal configurations share a cache entry."""
        return hash((type(self), *self.__dict__.values()))
