"""What happens to an update on the wire: secure aggregation and quantization."""

from typing import Literal

from conf.schema.base import Frozen

__all__ = ["NoQuantization", "NoSecureAggregation"]


class NoSecureAggregation(Frozen):
    """The server sees each site's (privatized) update."""

    kind: Literal["none"] = "none"


class NoQuantization(Frozen):
    """Updates travel as little-endian float32."""

    kind: Literal["none"] = "none"
