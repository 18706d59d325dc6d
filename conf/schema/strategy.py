"""How the server turns the sites' updates into the next adapter."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from conf.schema.base import Frozen
from conf.schema.objective import NoObjective, Objective
from conf.schema.robust import NoRobustness, Robust
from conf.schema.server_optimizer import NoServerOptimizer, ServerOptimizer

__all__ = [
    "FLASC",
    "FFALoRA",
    "FLoRA",
    "FedEx",
    "FedIT",
    "FedRot",
    "FedSALoRA",
    "FedSB",
    "FedSVD",
    "FlexLoRA",
    "HetLoRA",
    "Ravan",
    "RoLoRA",
    "Strategy",
    "Trains",
    "Weights",
]

Weights = Literal["uniform", "published_records"]
Trains = Literal["both", "one", "alternating", "cores"]
"""Of each LoRA layer: both factors, the one that starts at zero, one in odd rounds and the other in even ones, or none
but square cores between them."""


class _Averaging(Frozen):
    is_linear: ClassVar[bool] = True
    """Whether the combined update is a weighted sum of the updates."""
    trains: ClassVar[Trains] = "both"
    turns_coordinates: ClassVar[bool] = False
    """Whether a value of the update means something else from round to round."""
    folds: ClassVar[bool] = False
    """Whether what rank r cannot hold is folded into the base."""
    takes_ranks: ClassVar[bool] = False
    """Whether sites may train at lower ranks than the plan's."""
    personal: ClassVar[bool] = False
    """Whether a part of every site's model is its own, so that the server's model is nobody's."""
    sends_difference: ClassVar[bool] = True
    """Whether a site sends trained minus received of all that it trains, so that an update tells what its steps did."""
    incomparable: ClassVar[str] = ""
    """Why two sites' updates cannot be compared with each other; empty: they can."""

    @property
    def adds(self) -> bool:
        """Whether the server adds the mean update to an adapter whose coordinates mean the same in every round."""
        return self.is_linear and not self.turns_coordinates

    @property
    def cores(self) -> int:
        """The square cores between the factors of each layer; 0: a plain adapter."""
        return 0

    def cores_at(self, rank: int, whole: int) -> int:
        """Return the cores of a site that takes part at `rank` of a plan of rank `whole`."""
        return self.cores if self.cores <= 1 else self.cores * rank // whole

    def rank_within(self, rank: int, limit: int | None) -> int:
        """Return the rank at which a site takes part in a plan of `rank`: at most its `limit`; 0 where none fits."""
        return rank if limit is None else min(rank, limit)

    weights: Weights = Field(
        default="uniform",
        description="uniform, or by the record counts that the sites publish; exact counts are private and never used",
    )
    server_optimizer: ServerOptimizer = NoServerOptimizer()
    objective: Objective = NoObjective()
    robust: Robust = NoRobustness()


class FedIT(_Averaging):
    """Average both LoRA factors (Zhang et al. 2024, "Towards Building the Federated GPT")."""

    kind: Literal["fedit"] = "fedit"


class FFALoRA(_Averaging):
    """Freeze A, train and average B only (Sun et al. 2024, arXiv 2403.12313)."""

    kind: Literal["ffa_lora"] = "ffa_lora"
    trains: ClassVar[Trains] = "one"
    takes_ranks: ClassVar[bool] = True


class RoLoRA(_Averaging):
    """Train B in odd rounds, A in even ones (Chen et al. 2025, arXiv 2502.01755)."""

    kind: Literal["rolora"] = "rolora"
    trains: ClassVar[Trains] = "alternating"
    turns_coordinates: ClassVar[bool] = True


class FedSALoRA(_Averaging):
    """Share A; every site keeps a B of its own, so there is no global model (Guo et al. 2025, arXiv 2410.01463)."""

    kind: Literal["fedsa"] = "fedsa"
    personal: ClassVar[bool] = True
    sends_difference: ClassVar[bool] = False
    incomparable: ClassVar[str] = "every site has another B, and what its A does depends on it"


class FedSVD(_Averaging):
    """Train B; the server turns A to the singular vectors of the mean product (Lee et al. 2025, arXiv 2505.12805)."""

    kind: Literal["fedsvd"] = "fedsvd"
    trains: ClassVar[Trains] = "one"
    takes_ranks: ClassVar[bool] = True
    turns_coordinates: ClassVar[bool] = True


class FedRot(_Averaging):
    """Average both factors, rotated by each site onto the received ones first (2026, arXiv 2602.23638)."""

    kind: Literal["fedrot"] = "fedrot"
    sends_difference: ClassVar[bool] = False


class FLASC(_Averaging):
    """Average both factors; send the largest values alone, both ways (Kuo et al. 2024, arXiv 2406.05233)."""

    kind: Literal["flasc"] = "flasc"
    sends_difference: ClassVar[bool] = False
    incomparable: ClassVar[str] = "every site sends other entries, and most of what would be compared is zero"

    download_density: float = Field(
        default=1.0, ge=1e-6, le=1, description="share of the factors' values that a site is sent; 1: all of them"
    )
    upload_density: float = Field(
        default=1.0, ge=1e-6, le=1, description="share of the factors' changes that a site sends; 1: all of them"
    )


class FLoRA(_Averaging):
    """Stack all sites' factors into the base, and start each round anew (Wang et al. 2024, arXiv 2409.05976)."""

    kind: Literal["flora"] = "flora"
    is_linear: ClassVar[bool] = False
    folds: ClassVar[bool] = True
    takes_ranks: ClassVar[bool] = True


class FedEx(_Averaging):
    """Average both factors, fold the exact residual into the base (Singhal et al. 2025, arXiv 2410.09432)."""

    kind: Literal["fedex"] = "fedex"
    is_linear: ClassVar[bool] = False
    folds: ClassVar[bool] = True


class FlexLoRA(_Averaging):
    """The best rank-r approximation of the mean product (Bai et al. 2024, arXiv 2402.11505)."""

    kind: Literal["flexlora"] = "flexlora"
    is_linear: ClassVar[bool] = False
    takes_ranks: ClassVar[bool] = True


class HetLoRA(_Averaging):
    """Pad lower ranks with zeros, weigh by the product's norm (Cho et al. 2024, arXiv 2401.06432)."""

    kind: Literal["hetlora"] = "hetlora"
    is_linear: ClassVar[bool] = False
    takes_ranks: ClassVar[bool] = True


class FedSB(_Averaging):
    """Train one r x r core between frozen factors (Singhal et al. 2025, arXiv 2502.15436), drawn from the seed."""

    kind: Literal["fedsb"] = "fedsb"
    trains: ClassVar[Trains] = "cores"
    takes_ranks: ClassVar[bool] = True

    @property
    def cores(self) -> int:
        """One."""
        return 1


class Ravan(_Averaging):
    """Train several cores with a scale each (Raje et al. 2025, arXiv 2506.05568) between factors from the seed."""

    kind: Literal["ravan"] = "ravan"
    sends_difference: ClassVar[bool] = False
    trains: ClassVar[Trains] = "cores"
    takes_ranks: ClassVar[bool] = True

    heads: int = Field(default=4, ge=1, le=256, description="cores per layer; each has rank peft.rank / heads")

    @property
    def cores(self) -> int:
        """The heads."""
        return self.heads

    def rank_within(self, rank: int, limit: int | None) -> int:
        """Return the rank of the heads that fit."""
        width = rank // self.heads
        return rank if limit is None else min(rank, limit // width * width)


Strategy = Annotated[
    FedIT | FFALoRA | RoLoRA | FedSALoRA | FedSVD | FedRot | FLASC | FLoRA | FedEx | FlexLoRA | HetLoRA | FedSB | Ravan,
    Field(discriminator="kind"),
]
