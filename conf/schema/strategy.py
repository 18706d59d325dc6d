"""How the server turns the sites' updates into the next adapter."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = [
    "FFALoRA",
    "FedIT",
    "FedRot",
    "FedSALoRA",
    "FedSVD",
    "RoLoRA",
    "Strategy",
    "Trains",
    "Weights",
]

Weights = Literal["uniform", "published_records"]
Trains = Literal["both", "one", "alternating"]
"""Of each LoRA layer: both factors, the one that starts at zero, or one in odd rounds and the other in even ones."""


class _Averaging(Frozen):
    is_linear: ClassVar[bool] = True
    """Whether the combined update is a weighted sum of the updates."""
    trains: ClassVar[Trains] = "both"
    turns_coordinates: ClassVar[bool] = False
    """Whether a value of the update means something else from round to round."""

    weights: Weights = Field(
        default="uniform",
        description="uniform, or by the record counts that the sites publish; exact counts are private and never used",
    )


class FedIT(_Averaging):
    """Average both LoRA factors (Zhang et al. 2024, "Towards Building the Federated GPT")."""

    kind: Literal["fedit"] = "fedit"


class FFALoRA(_Averaging):
    """Freeze A, train and average B only (Sun et al. 2024, arXiv 2403.12313)."""

    kind: Literal["ffa_lora"] = "ffa_lora"
    trains: ClassVar[Trains] = "one"


class RoLoRA(_Averaging):
    """Train B in odd rounds, A in even ones (Chen et al. 2025, arXiv 2502.01755)."""

    kind: Literal["rolora"] = "rolora"
    trains: ClassVar[Trains] = "alternating"
    turns_coordinates: ClassVar[bool] = True


class FedSALoRA(_Averaging):
    """Share A; every site keeps a B of its own, so there is no global model (Guo et al. 2025, arXiv 2410.01463)."""

    kind: Literal["fedsa"] = "fedsa"


class FedSVD(_Averaging):
    """Train B; the server turns A to the singular vectors of the mean product (Lee et al. 2025, arXiv 2505.12805)."""

    kind: Literal["fedsvd"] = "fedsvd"
    trains: ClassVar[Trains] = "one"
    turns_coordinates: ClassVar[bool] = True


class FedRot(_Averaging):
    """Average both factors, rotated by each site onto the received ones first (2026, arXiv 2602.23638)."""

    kind: Literal["fedrot"] = "fedrot"


Strategy = Annotated[FedIT | FFALoRA | RoLoRA | FedSALoRA | FedSVD | FedRot, Field(discriminator="kind")]
