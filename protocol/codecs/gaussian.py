"""Quantizers of a standard normal value: Lloyd and Max's codebooks, and a distribution function to the last digit."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import torch

__all__ = ["centroids", "distortion", "nearest", "normal_cdf"]

_DIGITS = 30
_CELLS, _RANGE = 256, 8
"""Cells per unit of the table that finds a code, finer than the closest two boundaries; and where the table ends."""
_POSITIVE = {
    1: "0.7978846",
    2: "0.45278 1.510418",
    3: "0.2450942 0.7560053 1.343909 2.151946",
    4: "0.128395 0.3880483 0.6567591 0.9423405 1.256231 1.618046 2.069017 2.73259",
    5: (
        "0.06588966 0.1980518 0.3313783 0.4666995 0.6049336 0.7471357 0.8945651 1.048783 1.211804 1.38634 "
        "1.576228 1.787233 2.028728 2.317739 2.69112 3.260732"
    ),
    6: (
        "0.03340951 0.1002783 0.1672969 0.234567 0.3021928 0.3702826 0.4389497 0.5083138 0.578503 0.6496556 "
        "0.7219219 0.7954677 0.8704766 0.9471549 1.025736 1.106488 1.18972 1.275794 1.365141 1.458276 "
        "1.555831 1.658589 1.767542 1.883977 2.009611 2.14681 2.298981 2.471305 2.672274 2.917407 3.240437 "
        "3.744101"
    ),
    7: (
        "0.01682817 0.05049086 0.08417264 0.1178863 0.1516446 0.1854607 0.2193476 0.2533187 0.2873876 "
        "0.3215679 0.355874 0.3903203 0.4249216 0.4596934 0.4946515 0.5298122 0.5651927 0.6008105 0.6366843 "
        "0.6728333 0.7092778 0.7460391 0.7831396 0.820603 0.8584542 0.89672 0.9354285 0.97461 1.014297 "
        "1.054523 1.095327 1.136747 1.178829 1.221617 1.265165 1.309528 1.354766 1.400949 1.448149 1.49645 "
        "1.545944 1.596733 1.648934 1.702677 1.758111 1.815408 1.874763 1.936405 2.000602 2.067671 2.137993 "
        "2.212028 2.290339 2.373634 2.462811 2.559041 2.663887 2.779514 2.909047 3.057246 3.231933 3.44743 "
        "3.734937 4.189694"
    ),
    8: (
        "0.008446193 0.02533938 0.04223498 0.0591346 0.07603986 0.09295236 0.1098737 0.1268056 0.1437496 "
        "0.1607073 0.1776805 0.1946707 0.2116798 0.2287092 0.2457608 0.2628362 0.2799372 0.2970656 0.314223 "
        "0.3314114 0.3486324 0.365888 0.38318 0.4005102 0.4178806 0.4352932 0.4527499 0.4702527 0.4878036 "
        "0.5054048 0.5230583 0.5407663 0.558531 0.5763547 0.5942396 0.6121881 0.6302026 0.6482855 0.6664394 "
        "0.6846668 0.7029703 0.7213526 0.7398166 0.758365 0.7770008 0.795727 0.8145467 0.833463 0.8524793 "
        "0.8715989 0.8908253 0.9101621 0.929613 0.9491818 0.9688726 0.9886894 1.008636 1.028718 1.048939 "
        "1.069304 1.089818 1.110486 1.131313 1.152305 1.173468 1.194808 1.21633 1.238042 1.25995 1.282061 "
        "1.304384 1.326925 1.349694 1.372698 1.395946 1.419449 1.443217 1.467259 1.491587 1.516213 1.54115 "
        "1.56641 1.592008 1.617958 1.644276 1.67098 1.698087 1.725617 1.753589 1.782027 1.810953 1.840393 "
        "1.870375 1.900928 1.932084 1.963878 1.996348 2.029536 2.063485 2.098247 2.133874 2.170428 2.207975 "
        "2.24659 2.286354 2.327362 2.369717 2.413539 2.458962 2.506143 2.555259 2.606521 2.660174 2.716508 "
        "2.775871 2.838686 2.905473 2.976882 3.053742 3.137133 3.2285 3.329848 3.444072 3.575588 3.731666 "
        "3.925638 4.186595 4.603536"
    ),
}
"""The positive half of each codebook by bits (Lloyd 1982, section IX; Max 1960, table I): the fixed point at which each
value is the mean of its cell. Stored, not computed, so that both ends of a wire have the same digits."""


@cache
def centroids(bits: int) -> np.ndarray:
    """Return the 2^bits values of least squared error for N(0, 1), ascending, float32; one zero for 0 bits."""
    if bits == 0:
        return np.zeros(1, dtype=np.float32)
    positive = np.array(_POSITIVE[bits].split(), dtype=np.float32)
    return np.concatenate([-positive[::-1], positive])


@cache
def distortion(bits: int) -> float:
    """Return E (z - Q(z))² for z ~ N(0, 1): D_b, which is 1 for 0 bits."""
    levels = centroids(bits).astype(np.float64)
    edges = np.concatenate([[-math.inf], (levels[1:] + levels[:-1]) / 2, [math.inf]])
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    # E (z - Q)² = 1 - 2 Σ q E[z in cell] + Σ q² P(cell), and the density falls by the first over a cell.
    return float(1 + 2 * (levels * np.diff(density)).sum() + (levels**2 * np.diff(below)).sum())


def nearest(values: torch.Tensor, bits: int) -> np.ndarray:
    """Return the code (uint8) of the centroid nearest to each value, by a table of cells and one comparison."""
    first, boundaries = _table(bits)
    cells = values.mul(_CELLS).add_(_CELLS * _RANGE).clamp_(0, 2 * _CELLS * _RANGE - 1).to(torch.int32).reshape(-1)
    codes = first.index_select(0, cells)
    codes += values.reshape(-1) > boundaries.index_select(0, cells)
    return codes.reshape(values.shape).numpy()


@cache
def _table(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each cell, the code at its left edge, and the boundary at which the next code begins."""
    levels = centroids(bits)
    boundaries = np.append((levels[1:] + levels[:-1]) / 2, np.float32(np.inf))
    edges = np.arange(2 * _CELLS * _RANGE) / _CELLS - _RANGE
    first = np.searchsorted(boundaries[:-1], edges)
    return torch.from_numpy(first.astype(np.uint8)), torch.from_numpy(boundaries[first])


def normal_cdf(value: Decimal) -> Decimal:
    """Return Φ(value), correct to 20 digits, |value| ≤ 8, and the same digits on every machine.

    Φ(x) = 1/2 + φ(x) (x + x³/3 + x⁵/(3·5) + ...) (Abramowitz and Stegun 26.2.11). Tables of a lossless code follow from
    it: the last bit of a C library's erf may differ between machines, and one bit would garble the whole message.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        square, term, total, odd = value * value, value, value, 1
        while abs(term) > Decimal(10) ** -_DIGITS:
            odd += 2
            term = term * square / odd
            total += term
        return Decimal("0.5") + total * (-square / 2).exp() / _SQRT_2_PI


_SQRT_2_PI = Decimal("2.50662827463100050241576528481104525")
