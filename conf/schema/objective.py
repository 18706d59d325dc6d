"""What a site minimizes besides its loss, and what the server makes of sites that differ."""

from typing import Annotated, Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = ["FedDyn", "FedNova", "FedProx", "NoObjective", "Objective", "QFedAvg", "Scaffold"]


class NoObjective(Frozen):
    """The loss alone."""

    kind: Literal["none"] = "none"


class FedProx(Frozen):
    """A pull towards what was received (Li et al. 2020, arXiv 1812.06127)."""

    kind: Literal["fedprox"] = "fedprox"
    mu: float = Field(default=0.01, ge=0, le=1e4, description="strength of μ/2 ‖w - x‖²")


class Scaffold(Frozen):
    """Control variates against drift (Karimireddy et al. 2020, arXiv 1910.06378)."""

    kind: Literal["scaffold"] = "scaffold"


class FedNova(Frozen):
    """Updates per step, so that sites which take fewer steps count in full (Wang et al. 2020, arXiv 2007.07481)."""

    kind: Literal["fednova"] = "fednova"


class FedDyn(Frozen):
    """Dynamic regularization (Acar et al. 2021, arXiv 2111.04263)."""

    kind: Literal["feddyn"] = "feddyn"
    alpha: float = Field(default=0.01, ge=1e-9, le=1e4, description="strength of the regularization")


class QFedAvg(Frozen):
    """More weight for sites with a higher loss (Li et al. 2020, arXiv 1905.10497). The loss has to leave the site."""

    kind: Literal["qfedavg"] = "qfedavg"
    q: float = Field(default=0.2, ge=0, le=20, description="0: all alike; the higher, the more the worst site counts")


Objective = Annotated[NoObjective | FedProx | Scaffold | FedNova | FedDyn | QFedAvg, Field(discriminator="kind")]
