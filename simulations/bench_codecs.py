"""What each wire codec costs and loses on one vector, side by side in one run: bits, error, seconds.

Gaussian values, processor time of one thread, the best of the repetitions. bitsandbytes' NF4, which other frameworks
use, is measured beside where it is installed. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from conf.schema import wire
from protocol.codecs.base import WireContext
from protocol.codecs.build import build_codec
from protocol.tensors import byte_count, layout_of

__all__ = ["Measured", "main", "measure", "measure_all", "print_table"]

_VALUES = 10_000_000
_CODECS: tuple[wire.Quantization, ...] = (
    wire.NoQuantization(),
    wire.BFloat16(),
    wire.Float16(),
    wire.Eden(bits=1),
    wire.Eden(bits=2),
    wire.Eden(bits=2.5),
    wire.Eden(bits=4),
    wire.Eden(bits=8),
    wire.UniformEntropy(bits=2),
    wire.UniformEntropy(bits=4),
    wire.Int8(),
    wire.Int4(),
    wire.NF4(),
    wire.SignSGD(),
    wire.TopK(),
    wire.Lattice(),
)


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    name: str
    bits: float
    """Per value, everything that travels."""
    error: float
    """Squared error over squared norm."""
    encode_s: float
    decode_s: float


def measure(config: wire.Quantization, x: torch.Tensor, repetitions: int) -> Measured:
    """Return what one codec makes of a vector of norm 1."""
    codec, tensors = build_codec(config), {"x": x}
    context = WireContext("bench", 1, "site", "up")
    encoded, encode_s = _best(lambda: codec.encode(tensors, context, context.rounding()), repetitions)
    decoded, decode_s = _best(lambda: codec.decode(encoded, layout_of(tensors), context), repetitions)
    return Measured(_name(config), 8 * byte_count(encoded) / x.numel(), _error(decoded["x"], x), encode_s, decode_s)


def measure_all(values: int = _VALUES, repetitions: int = 3) -> list[Measured]:
    """Return a line for every codec, and for bitsandbytes' NF4 where it is installed."""
    torch.set_num_threads(1)
    x = torch.randn(values, generator=torch.Generator().manual_seed(0))
    x /= x.norm()
    lines = [measure(config, x, repetitions) for config in _CODECS]
    return lines + ([_bitsandbytes(x, repetitions)] if find_spec("bitsandbytes") else [])


def print_table(quick: bool) -> None:
    """Measure and print; `quick` takes a million values, once."""
    from rich.console import Console
    from rich.table import Table

    values = _VALUES // 10 if quick else _VALUES
    machine = f"{platform.machine()}, one of {os.cpu_count()} cores, torch {torch.__version__}"
    table = Table(title=f"wire codecs on {values / 1e6:g} million Gaussian values, {machine}")
    table.add_column("codec")
    for heading in ("bits a value", "squared error", "encode, s", "decode, s"):
        table.add_column(heading, justify="right")
    for line in measure_all(values, 1 if quick else 3):
        table.add_row(
            line.name, f"{line.bits:.3f}", f"{line.error:.3g}", f"{line.encode_s:.3f}", f"{line.decode_s:.3f}"
        )
    table.caption = "aim: eden at 4 bits, encode and decode below 1 s together for 10 million"
    if not find_spec("bitsandbytes"):
        table.caption += "; bitsandbytes is not installed"
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a million values, once")
    print_table(parser.parse_args(arguments).quick)


def _name(config: wire.Quantization) -> str:
    kept = {name: value for name, value in config.model_dump(exclude={"kind"}).items() if name in ("bits", "fraction")}
    return " ".join([config.kind, *(f"{name} {value:g}" for name, value in kept.items())])


def _best(call: Callable[[], Any], repetitions: int) -> tuple[Any, float]:
    result, best = None, float("inf")
    for _ in range(repetitions):
        began = time.process_time()
        result = call()
        best = min(best, time.process_time() - began)
    return result, best


def _error(decoded: torch.Tensor, x: torch.Tensor) -> float:
    return float((decoded - x).double().square().sum() / x.double().square().sum())


def _bitsandbytes(x: torch.Tensor, repetitions: int) -> Measured:
    import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports] - optional

    (codes, state), encode_s = _best(lambda: bnb.quantize_4bit(x, blocksize=64, quant_type="nf4"), repetitions)
    decoded, decode_s = _best(lambda: bnb.dequantize_4bit(codes, state), repetitions)
    bits = 8 * (codes.numel() * codes.element_size() + state.absmax.numel() * state.absmax.element_size()) / x.numel()
    return Measured("bitsandbytes nf4", bits, _error(decoded.reshape(x.shape), x), encode_s, decode_s)


if __name__ == "__main__":
    main()
