"""What the server does with the combined update: add it, or feed it to an optimizer as a pseudo-gradient."""

from typing import Annotated, Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi", "NoServerOptimizer", "ServerOptimizer"]


class NoServerOptimizer(Frozen):
    """Add the combined update."""

    kind: Literal["none"] = "none"


class FedAvgM(Frozen):
    """Heavy-ball momentum (Hsu et al. 2019, arXiv 1909.06335)."""

    kind: Literal["fedavgm"] = "fedavgm"
    learning_rate: float = Field(default=1.0, ge=1e-12, le=1e3)
    momentum: float = Field(default=0.9, ge=0, le=0.9999)


class _Adaptive(Frozen):
    learning_rate: float = Field(default=0.1, ge=1e-12, le=1e3)
    beta1: float = Field(default=0.9, ge=0, le=0.9999, description="decay of the first moment")
    head_learning_rate: float | None = Field(
        default=None,
        ge=1e-12,
        le=1e3,
        description="of tensors that are trained whole, such as a classification head; null: learning_rate",
    )
    tau: float = Field(
        default=1e-3, ge=1e-12, le=1e6, description="added to the second moment's root: how little it adapts"
    )


class FedAdagrad(_Adaptive):
    """Sum of squares (Reddi et al. 2021, arXiv 2003.00295)."""

    kind: Literal["fedadagrad"] = "fedadagrad"
    beta1: float = Field(default=0.0, ge=0, le=0.9999, description="decay of the first moment")


class FedAdam(_Adaptive):
    """Moving average of squares (Reddi et al. 2021, arXiv 2003.00295)."""

    kind: Literal["fedadam"] = "fedadam"
    beta2: float = Field(default=0.99, ge=0, le=0.999999, description="decay of the second moment")
    bias_correction: bool = Field(default=True, description="make up for moments that start at zero, as Flower does")


class FedYogi(_Adaptive):
    """Additive control of the second moment (Reddi et al. 2021, arXiv 2003.00295)."""

    kind: Literal["fedyogi"] = "fedyogi"
    beta2: float = Field(default=0.99, ge=0, le=0.999999, description="decay of the second moment")


ServerOptimizer = Annotated[NoServerOptimizer | FedAvgM | FedAdagrad | FedAdam | FedYogi, Field(discriminator="kind")]
