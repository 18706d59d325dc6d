"""ε of executed steps, against golden figures and against accountants that share no code with ours."""

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant

from privacy.accounting import SubsampledGaussian, epsilon_of, epsilon_on_grid
from protocol.errors import PrivacyError

# Rate 0.01, δ = 1e-5: ε by PLD on a grid of 1e-4, computed with dp-accounting 0.6.0 when the library was chosen.
GOLDEN = {
    (0.6, 100): 3.816,
    (0.6, 1000): 7.434,
    (0.6, 10000): 23.018,
    (0.8, 100): 1.511,
    (0.8, 1000): 3.141,
    (0.8, 10000): 10.054,
    (1.0, 100): 0.718,
    (1.0, 1000): 1.828,
    (1.0, 10000): 6.188,
    (1.5, 100): 0.292,
    (1.5, 1000): 0.918,
    (1.5, 10000): 3.186,
    (2.0, 100): 0.190,
    (2.0, 1000): 0.622,
    (2.0, 10000): 2.163,
}
MIXED = (SubsampledGaussian(0.01, 1.0, 200), SubsampledGaussian(0.05, 1.5, 50), SubsampledGaussian(1.0, 8.0, 3))


@pytest.mark.parametrize(("noise", "steps"), GOLDEN)
def test_golden_figures(noise: float, steps: int) -> None:
    golden = GOLDEN[noise, steps]
    # The figures are rounded to the third digit.
    assert epsilon_of([SubsampledGaussian(0.01, noise, steps)], 1e-5) == pytest.approx(golden, rel=0.01, abs=6e-4)


@pytest.mark.parametrize(("noise", "steps"), [(0.8, 100), (1.0, 1000), (2.0, 1000)])
def test_the_event_means_the_same_to_dp_accounting(noise: float, steps: int) -> None:
    mechanism = SubsampledGaussian(0.01, noise, steps)
    theirs = PLDAccountant(value_discretization_interval=1e-4).compose(mechanism.event()).get_epsilon(1e-5)
    assert epsilon_on_grid((mechanism,), 1e-5, 1e-4) == pytest.approx(theirs, rel=1e-6)
    assert epsilon_of([mechanism], 1e-5) == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("mechanisms", [MIXED[:1], MIXED[:2], MIXED], ids=len)
def test_it_is_below_renyi_and_near_opacus(mechanisms: tuple[SubsampledGaussian, ...]) -> None:
    ours = epsilon_of(mechanisms, 1e-5)
    renyi, prv = RdpAccountant(), PRVAccountant()
    for mechanism in mechanisms:
        renyi.compose(mechanism.event())
        for _ in range(mechanism.steps):
            prv.step(noise_multiplier=mechanism.noise_multiplier, sample_rate=mechanism.sampling_rate)
    assert ours <= renyi.get_epsilon(1e-5)
    # Opacus adds its own error bound to the result.
    assert ours == pytest.approx(prv.get_epsilon(1e-5, eps_error=0.01), abs=0.015, rel=0.01)


def test_mechanisms_compose_whatever_their_order_and_grouping() -> None:
    events = dp_accounting.ComposedDpEvent([mechanism.event() for mechanism in MIXED])
    theirs = PLDAccountant(value_discretization_interval=1e-4).compose(events).get_epsilon(1e-5)
    ours = epsilon_of(MIXED, 1e-5)
    assert ours == pytest.approx(theirs, rel=0.01)
    assert epsilon_of(MIXED[::-1], 1e-5) == ours
    split = [SubsampledGaussian(0.01, 1.0, 1)] * 200 + list(MIXED[1:])
    assert epsilon_of(split, 1e-5) == ours


def test_the_full_batch_gaussian_is_exact() -> None:
    """T unsampled steps of noise σ are one Gaussian of noise σ/√T; its δ(ε) is known (Balle and Wang 2018, eq. 6)."""
    sigma, steps, delta = 6.0, 9, 1e-5
    ours = epsilon_of([SubsampledGaussian(1.0, sigma, steps)], delta)
    mu = math.sqrt(steps) / sigma
    normal = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    reached = normal(mu / 2 - ours / mu) - math.exp(ours) * normal(-mu / 2 - ours / mu)
    assert reached <= delta * (1 + 1e-9)
    assert reached == pytest.approx(delta, rel=0.05)


def test_nothing_executed_costs_nothing() -> None:
    assert epsilon_of([], 1e-5) == 0.0
    assert epsilon_of([SubsampledGaussian(0.1, 1.0, 0)], 1e-5) == 0.0
    assert epsilon_of([SubsampledGaussian(0.1, 0.0, 0)], 1e-5) == 0.0


def test_no_noise_costs_infinity() -> None:
    assert epsilon_of([SubsampledGaussian(0.1, 0.0, 1)], 1e-5) == math.inf
    assert epsilon_of([MIXED[0], SubsampledGaussian(0.1, 0.0, 1)], 1e-5) == math.inf


def test_it_moves_the_right_way() -> None:
    def cost(rate: float = 0.02, noise: float = 1.0, steps: int = 100, delta: float = 1e-5) -> float:
        return epsilon_of([SubsampledGaussian(rate, noise, steps)], delta)

    assert cost() < cost(steps=101) < cost(steps=200)
    assert cost() < cost(rate=0.03)
    assert cost() < cost(noise=0.9)
    assert cost() < cost(delta=1e-6)
    by_steps = [cost(steps=steps) for steps in (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129)]
    assert by_steps == sorted(by_steps)
    assert epsilon_of(MIXED[:2], 1e-5) < epsilon_of(MIXED, 1e-5)


def test_a_fine_grid_is_used_where_a_coarse_one_is_loose() -> None:
    """Rate 1e-4, noise 0.8, 4000 steps: a grid of 1e-3 overstates ε by 43 percent."""
    mechanism = SubsampledGaussian(1e-4, 0.8, 4000)
    ours = epsilon_of([mechanism], 1e-6)
    assert epsilon_on_grid((mechanism,), 1e-6, 1e-3) > 1.4 * ours
    finer = epsilon_on_grid((mechanism,), 1e-6, 2e-5)
    assert finer * 0.999 <= ours <= 1.02 * finer


@pytest.mark.parametrize("fields", [(0.1, 1.0, -1), (0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, -1.0, 1), (0.1, math.nan, 1)])
def test_what_is_no_mechanism_is_refused(fields: tuple[float, float, int]) -> None:
    """Negative steps, above all: booked in a ledger they would give budget back."""
    with pytest.raises(PrivacyError, match="is no mechanism"):
        SubsampledGaussian(*fields)
