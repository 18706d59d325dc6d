"""What happens to an update on the wire: secure aggregation and quantization."""

from typing import Annotated, Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = [
    "NF4",
    "BFloat16",
    "Eden",
    "Float16",
    "Int4",
    "Int8",
    "Lattice",
    "NoQuantization",
    "NoSecureAggregation",
    "Quantization",
    "SignSGD",
    "TopK",
    "UniformEntropy",
]


class NoSecureAggregation(Frozen):
    """The server sees each site's (privatized) update."""

    kind: Literal["none"] = "none"


class NoQuantization(Frozen):
    """Tensors travel as little-endian float32, both ways; without their zeros where that takes fewer bytes."""

    kind: Literal["none"] = "none"


class _Quantized(Frozen):
    downlink: Literal["none", "same"] = Field(
        default="none",
        description="what the server sends: none, the adapter in float32; same, its change since the last round in "
        "this codec, to sites that hold that round's adapter. Updates of sites are always encoded",
    )


class BFloat16(_Quantized):
    """16 bits: float32's range, 8 bits of precision."""

    kind: Literal["bf16"] = "bf16"


class Float16(_Quantized):
    """16 bits: 11 bits of precision, below a common power of two."""

    kind: Literal["fp16"] = "fp16"


class Eden(_Quantized):
    """Random rotation, Lloyd-Max codebook, exact scale (Vargaftik et al. 2022, arXiv 2108.08842)."""

    kind: Literal["eden"] = "eden"
    bits: float = Field(default=4, ge=0.5, le=8, description="per value; any rate, fractions too")
    scale: Literal["unbiased", "min_mse"] = Field(
        default="unbiased",
        description="unbiased: errors of sites average out; min_mse: least error of one site, and the norm never grows",
    )


class UniformEntropy(_Quantized):
    """Random rotation, uniform lattice, entropy coding: a quarter of a bit from the limit at any rate."""

    kind: Literal["uniform_entropy"] = "uniform_entropy"
    bits: float = Field(default=4, ge=1, le=8, description="per value, after entropy coding")
    scale: Literal["unbiased", "min_mse"] = "unbiased"


class _Blockwise(_Quantized):
    block_size: int = Field(default=64, ge=8, le=4096, multiple_of=8, description="values that share a scale")


class Int8(_Blockwise):
    """Blocks scaled by their largest value, rounded at random to 255 levels: unbiased."""

    kind: Literal["int8"] = "int8"


class Int4(_Blockwise):
    """Blocks scaled by their largest value, rounded at random to 15 levels: unbiased."""

    kind: Literal["int4"] = "int4"


class NF4(_Blockwise):
    """Blocks scaled by their largest value, rounded to QLoRA's 16 levels: biased, for comparison."""

    kind: Literal["nf4"] = "nf4"


class _WithFeedback(_Quantized):
    error_feedback: bool = Field(
        default=True, description="keep at the site what was lost, and add it to the next update"
    )


class SignSGD(_WithFeedback):
    """One bit per value and the mean size (Karimireddy et al. 2019, arXiv 1901.09847)."""

    kind: Literal["signsgd"] = "signsgd"


class TopK(_WithFeedback):
    """The largest values alone (Stich et al. 2018, arXiv 1809.07599)."""

    kind: Literal["topk"] = "topk"
    fraction: float = Field(default=0.05, ge=1e-6, le=0.5, description="share of the values that is sent")


class Lattice(Frozen):
    """Integers modulo a power of two whose sums decode to the sum (Kairouz et al. 2021, arXiv 2102.06387)."""

    kind: Literal["lattice"] = "lattice"
    bits: int = Field(default=16, ge=4, le=16, description="of the modulus")
    norm_bound: float = Field(
        default=1, ge=1e-9, le=1e9, description="updates are clipped to this L2 norm before they are rounded"
    )
    max_summands: int = Field(
        default=64, ge=1, le=1_000_000, description="updates that may be added without wrapping around"
    )


Quantization = Annotated[
    NoQuantization | BFloat16 | Float16 | Eden | UniformEntropy | Int8 | Int4 | NF4 | SignSGD | TopK | Lattice,
    Field(discriminator="kind"),
]
