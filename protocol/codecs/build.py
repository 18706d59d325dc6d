"""From a quantization's configuration to its codec: the one place that knows the family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conf.schema import wire
from protocol.codecs.base import Codec
from protocol.codecs.blockwise import Blockwise
from protocol.codecs.eden import Eden
from protocol.codecs.half_precision import HalfPrecision
from protocol.codecs.lattice import Lattice
from protocol.codecs.nf4 import NF4
from protocol.codecs.none import NoCodec
from protocol.codecs.signsgd import SignSGD
from protocol.codecs.topk import TopK
from protocol.codecs.uniform_entropy import UniformEntropy

__all__ = ["CODECS", "build_codec", "has_error_feedback", "sends_changes"]

CODECS: dict[type[wire.Quantization], Callable[[Any], Codec]] = {
    wire.NoQuantization: lambda config: NoCodec(),
    wire.BFloat16: lambda config: HalfPrecision("bf16"),
    wire.Float16: lambda config: HalfPrecision("fp16"),
    wire.Eden: lambda config: Eden(config.bits, config.scale),
    wire.UniformEntropy: lambda config: UniformEntropy(config.bits, config.scale),
    wire.Int8: lambda config: Blockwise(8, config.block_size),
    wire.Int4: lambda config: Blockwise(4, config.block_size),
    wire.NF4: lambda config: NF4(config.block_size),
    wire.SignSGD: lambda config: SignSGD(),
    wire.TopK: lambda config: TopK(config.fraction),
    wire.Lattice: lambda config: Lattice(config.bits, config.norm_bound, config.max_summands),
}


def build_codec(config: wire.Quantization) -> Codec:
    """Return the codec that a validated configuration names."""
    return CODECS[type(config)](config)


def has_error_feedback(config: wire.Quantization) -> bool:
    """Return whether what a message left out is added to the next one."""
    return isinstance(config, wire.SignSGD | wire.TopK) and config.error_feedback


def sends_changes(config: wire.Quantization) -> bool:
    """Return whether the server sends encoded changes of its adapter, so that sites keep what they receive."""
    return not isinstance(config, wire.NoQuantization | wire.Lattice) and config.downlink == "same"
