"""The published errors of each rate, whatever the input's distribution; and where the numbers come from."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from protocol.codecs.base import WireContext
from protocol.codecs.eden import Eden
from protocol.codecs.gaussian import centroids, distortion, nearest, normal_cdf
from protocol.codecs.uniform_entropy import UniformEntropy, step_of_rate
from protocol.tensors import layout_of

VALUES = 65_536
"""Of the published experiments."""


def gauss(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(VALUES, generator=generator)


def lognormal(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(VALUES, generator=generator).exp()


def student(generator: torch.Generator) -> torch.Tensor:
    return (
        torch.randn(VALUES, generator=generator) / torch.randn(3, VALUES, generator=generator).square().mean(0).sqrt()
    )


def error(codec: Eden | UniformEntropy, draw: Callable[[torch.Generator], torch.Tensor], rounds: int = 3) -> float:
    """Return the mean of |decoded - x|² / |x|² over `rounds` rotations and inputs."""
    total = 0.0
    for number in range(rounds):
        context = WireContext("run", number, "harbor", "up")
        x = draw(torch.Generator().manual_seed(number))
        decoded = codec.decode(codec.encode({"x": x}, context, context.rounding()), layout_of({"x": x}), context)["x"]
        total += float((decoded - x).double().square().sum() / x.double().square().sum())
    return total / rounds


@pytest.mark.parametrize("draw", [gauss, lognormal, student])
@pytest.mark.parametrize(
    ("bits", "published"), [(1, math.pi / 2 - 1), (2, 0.1331), (3, 0.03578), (4, 0.009592), (8, 4.12e-5)]
)
def test_unbiased_eden_errs_as_published(draw: Callable[..., torch.Tensor], bits: int, published: float) -> None:
    """D/(1-D) of the Lloyd-Max distortion D; π/2 - 1 at one bit is DRIVE's constant."""
    assert error(Eden(bits), draw) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("bits", [0.5, 0.75, 1.5, 2.5, 6.3])
def test_fractions_of_a_bit_err_as_the_mixture_does(bits: float) -> None:
    mixed = Eden(bits).distortion
    assert error(Eden(bits), gauss) == pytest.approx(mixed / (1 - mixed), rel=0.02)
    assert error(Eden(bits, "min_mse"), gauss) == pytest.approx(mixed, rel=0.02)


def test_below_one_bit_is_random_sparsification() -> None:
    """A share p of signs: 1/(p 2/π) - 1, as the unbiased scale makes it."""
    assert error(Eden(0.5), student) == pytest.approx(math.pi - 1, rel=0.02)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.3634), (2, 0.11748), (3, 0.03455), (4, 0.009501)])
def test_the_least_squares_scale_errs_as_lloyd_and_max(bits: int, published: float) -> None:
    assert error(Eden(bits, "min_mse"), lognormal) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.5345), (2, 0.0976), (3, 0.02274), (4, 0.005591), (8, 2.2e-5)])
def test_entropy_coding_errs_as_published(bits: int, published: float) -> None:
    assert error(UniformEntropy(bits), student) == pytest.approx(published, rel=0.02)


def test_the_gap_of_entropy_coding_is_a_quarter_of_a_bit() -> None:
    """Gish and Pierce: log2 √(πe/6) = 0.2546 bit above the rate-distortion function of a Gaussian."""
    reached = error(UniformEntropy(5, "min_mse"), gauss)
    assert 5 - 0.5 * math.log2(1 / reached) == pytest.approx(0.5 * math.log2(math.pi * math.e / 6), abs=0.01)


@pytest.mark.parametrize("bits", [1, 2.5, 4, 8])
def test_the_step_gives_the_entropy(bits: float) -> None:
    step = step_of_rate(bits)
    cells = np.diff(stats.norm.cdf((np.arange(-2000, 2001) + 0.5) * step))
    assert -float(np.sum(cells[cells > 0] * np.log2(cells[cells > 0]))) == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_codebook_is_lloyd_and_maxs_fixed_point(bits: int) -> None:
    """Each value is the mean of its cell, whose edges are half way to the next value (scipy's normal distribution)."""
    levels = centroids(bits).astype(np.float64)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    means = -np.diff(stats.norm.pdf(edges)) / np.diff(stats.norm.cdf(edges))
    np.testing.assert_allclose(levels, means, atol=2e-6)
    assert levels.size == 2**bits


@pytest.mark.parametrize(("bits", "published"), [(0, 1), (1, 0.3634), (2, 0.11748), (3, 0.03455), (4, 0.009501)])
def test_distortions_are_lloyd_and_maxs(bits: int, published: float) -> None:
    """Max 1960, table I; and an integral that knows nothing of cells."""
    assert distortion(bits) == pytest.approx(published, rel=1e-3)
    levels = centroids(bits).astype(np.float64)

    def squared(z: float) -> float:
        return float(np.min((z - levels) ** 2) * stats.norm.pdf(z))

    edges = (levels[1:] + levels[:-1]) / 2
    assert distortion(bits) == pytest.approx(integrate.quad(squared, -9, 9, points=edges, limit=200)[0], rel=1e-6)


@pytest.mark.parametrize("bits", range(9))
def test_the_table_finds_the_nearest_value(bits: int) -> None:
    values = torch.cat(
        [torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 2, torch.tensor([-99.0, 0, 99])]
    )
    levels = torch.from_numpy(centroids(bits))
    found = levels[torch.from_numpy(nearest(values, bits)).long()]
    torch.testing.assert_close((values - found).abs(), (values[:, None] - levels).abs().amin(1), rtol=0, atol=0)


@pytest.mark.parametrize("value", ["0", "0.001", "-0.5", "1", "-3.7", "7.5", "8"])
def test_the_distribution_function_has_twenty_digits(value: str) -> None:
    """Against mpmath, whose erfc knows nothing of the series."""
    from mpmath import erfc, mp, mpf, sqrt

    with mp.workdps(40):
        exact = str(erfc(-mpf(value) / sqrt(2)) / 2)
    with localcontext() as context:
        context.prec = 40
        assert abs(normal_cdf(Decimal(value)) - Decimal(exact)) < Decimal("1e-20")
