"""How the server turns the sites' updates into the next adapter."""

from typing import Annotated, Literal

from pydantic import Field

from conf.schema.base import Frozen
from conf.schema.objective import NoObjective, Objective
from conf.schema.robust import NoRobustness, Robust
from conf.schema.server_optimizer import NoServerOptimizer, ServerOptimizer

__all__ = ["FFALoRA", "FedIT", "Strategy", "Weights"]

Weights = Literal["uniform", "published_records"]


class _Averaging(Frozen):
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


Strategy = Annotated[FedIT | FFALoRA, Field(discriminator="kind")]
