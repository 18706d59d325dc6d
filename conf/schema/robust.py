"""How the server combines updates when some sites may send anything at all."""

from typing import Annotated, Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = [
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "CoordinateMedian",
    "FLTrust",
    "GeometricMedian",
    "Krum",
    "Mixing",
    "MultiKrum",
    "NearestNeighbors",
    "NoMixing",
    "NoRobustness",
    "NormBound",
    "Robust",
    "TrimmedMean",
    "replies_needed",
]


class NoMixing(Frozen):
    """Each update as it came."""

    kind: Literal["none"] = "none"


class Bucketing(Frozen):
    """Means of random buckets take the updates' place (Karimireddy et al. 2022, arXiv 2006.09365)."""

    kind: Literal["bucketing"] = "bucketing"
    size: int = Field(default=2, ge=1, le=1_000_000, description="updates per bucket")


class NearestNeighbors(Frozen):
    """The mean of its nearest neighbors takes each update's place (Allouah et al. 2023, arXiv 2302.01772)."""

    kind: Literal["nearest_neighbors"] = "nearest_neighbors"


Mixing = Annotated[NoMixing | Bucketing | NearestNeighbors, Field(discriminator="kind")]
Distance = Literal["product", "factors"]


class NoRobustness(Frozen):
    """Trust every site that takes part."""

    kind: Literal["none"] = "none"


class NormBound(Frozen):
    """Scale longer updates down to a bound, then combine as ever (Sun et al. 2019, arXiv 1911.07963)."""

    kind: Literal["norm_bound"] = "norm_bound"
    max_norm: float = Field(default=1.0, ge=1e-9, le=1e9, description="L2 norm that an update keeps at most")
    distance: Distance = Field(
        default="product", description="norm of the factors and the change of BA together, or of the factors alone"
    )


class _Rule(Frozen):
    attackers: int = Field(default=1, ge=0, le=1_000_000, description="f: the most sites that may send anything")
    distance: Distance = Field(
        default="product",
        description="between the factors and the products BA together, or between the factors alone",
    )
    mixing: Mixing = NoMixing()


class CoordinateMedian(_Rule):
    """The median of each coordinate (Yin et al. 2018, arXiv 1803.01498)."""

    kind: Literal["median"] = "median"


class TrimmedMean(_Rule):
    """The mean of each coordinate without the f lowest and highest (Yin et al. 2018, arXiv 1803.01498)."""

    kind: Literal["trimmed_mean"] = "trimmed_mean"


class Krum(_Rule):
    """The update with the nearest neighbors (Blanchard et al. 2017, arXiv 1703.02757)."""

    kind: Literal["krum"] = "krum"


class MultiKrum(_Rule):
    """The mean of the updates with the nearest neighbors (Blanchard et al. 2017, arXiv 1703.02757)."""

    kind: Literal["multi_krum"] = "multi_krum"
    selected: int | None = Field(
        default=None, ge=1, le=1_000_000, description="updates that are averaged; null: all but f"
    )


class Bulyan(_Rule):
    """Of the updates that Krum selects, the coordinates nearest to their median (El Mhamdi et al. 2018, 1802.07927)."""

    kind: Literal["bulyan"] = "bulyan"


class GeometricMedian(_Rule):
    """The point with the least sum of distances (Pillutla et al. 2022, arXiv 1912.13445)."""

    kind: Literal["geometric_median"] = "geometric_median"
    iterations: int = Field(default=32, ge=1, le=10_000)
    smoothing: float = Field(default=1e-6, ge=1e-12, le=1, description="least distance, as a share of the median norm")


class CenteredClipping(_Rule):
    """Steps of bounded length away from the last round's update (Karimireddy et al. 2021, arXiv 2012.10333)."""

    kind: Literal["centered_clipping"] = "centered_clipping"
    radius: float = Field(default=1.0, ge=1e-9, le=1e9, description="the furthest that one update can pull")
    iterations: int = Field(default=3, ge=1, le=1000)


class FLTrust(_Rule):
    """Updates count as far as they point where the server's own does (Cao et al. 2021, arXiv 2012.13995)."""

    kind: Literal["fltrust"] = "fltrust"
    root_records: int = Field(
        default=64,
        ge=1,
        le=1 << 31,
        description="public held-out records that the server trains on; evaluation goes without them",
    )


Robust = Annotated[
    NoRobustness
    | NormBound
    | CoordinateMedian
    | TrimmedMean
    | Krum
    | MultiKrum
    | Bulyan
    | GeometricMedian
    | CenteredClipping
    | FLTrust,
    Field(discriminator="kind"),
]


def replies_needed(robust: Robust) -> int:
    """Return the fewest replies with which a rule withstands `attackers`, its mixing included."""
    if isinstance(robust, NoRobustness | NormBound):
        return 1
    f = robust.attackers
    match robust:
        case Krum() | MultiKrum():
            needed = 2 * f + 3
        case Bulyan():
            needed = 4 * f + 3
        case FLTrust():
            needed = 1
        case _:
            needed = 2 * f + 1
    if isinstance(robust, MultiKrum) and robust.selected is not None:
        needed = max(needed, robust.selected + f)
    # Every bucket that an attacker is in counts as one more attacker's.
    return (needed - 1) * robust.mixing.size + 1 if isinstance(robust.mixing, Bucketing) else needed
