"""Rényi costs against enumerated discrete noise and against the library's own composition."""

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.special import logsumexp

from privacy.mechanisms import SubsampledGaussian
from privacy.renyi import (
    ORDERS,
    conversion,
    order_costs,
    renyi_epsilon,
    renyi_over_sites,
    renyi_selection_epsilon,
    zcdp_epsilon,
)


@pytest.mark.parametrize(("rate", "shift", "sigma"), [(0.1, 1, 1.0), (0.01, 2, 1.6), (0.5, 3, 3.0), (0.3, 1, 0.5)])
def test_sampled_discrete_noise_costs_exactly_this_at_integer_orders(rate: float, shift: int, sigma: float) -> None:
    """Both directions, summed over the integers: the one with the mixture above is met, the other is below."""
    x = np.arange(-400, 401)

    def log_mass(center: int) -> np.ndarray:
        weights = -((x - center) ** 2) / (2 * sigma**2)
        return weights - logsumexp(weights)

    q = log_mass(0)
    p = np.logaddexp(math.log(1 - rate) + q, math.log(rate) + log_mass(shift))
    orders = [2, 3, 5, 12, 2.5]
    costs = order_costs([SubsampledGaussian(rate, sigma / shift, 1, discrete=True)], orders)
    for order, cost in zip(orders, costs, strict=True):
        above = logsumexp(order * p + (1 - order) * q) / (order - 1)
        below = logsumexp(order * q + (1 - order) * p) / (order - 1)
        assert below <= cost * (1 + 1e-9)
        if float(order).is_integer():
            assert above == pytest.approx(cost, rel=1e-9)
        else:
            assert above <= cost


def test_unsampled_discrete_noise_costs_no_more_than_continuous() -> None:
    orders = [1.5, 2, 7.3]
    assert order_costs([SubsampledGaussian(1.0, 3.0, 4, discrete=True)], orders) == pytest.approx(
        [4 * order / 18 for order in orders]
    )


def test_it_is_the_library_s_composition() -> None:
    mechanisms = [SubsampledGaussian(0.01, 1.0, 300), SubsampledGaussian(0.2, 4.0, 20), SubsampledGaussian(1.0, 9.0, 2)]
    theirs = RdpAccountant(ORDERS)
    for mechanism in mechanisms:
        step = PoissonSampledDpEvent(mechanism.sampling_rate, GaussianDpEvent(mechanism.noise_multiplier))
        theirs.compose(step, mechanism.steps)
    assert renyi_epsilon(mechanisms, 1e-6) == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-9)


def test_selection_is_the_library_s_event() -> None:
    step = SelfComposedDpEvent(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.2)), 100)
    theirs = RdpAccountant(ORDERS).compose(RepeatAndSelectDpEvent(step, mean=5.0, shape=math.inf))
    ours = renyi_selection_epsilon([[SubsampledGaussian(0.02, 1.2, 100)]], 1e-5, 5.0)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)


def test_the_conversion_is_near_the_best_possible_for_a_gaussian() -> None:
    """zCDP converts at the best real order: 8.8985 for the Gboard tree's ρ = 79/98, and never above a listed order."""
    assert zcdp_epsilon(79 / 98, 1e-10) == pytest.approx(8.8985, abs=1e-4)
    assert zcdp_epsilon(0.0, 1e-10) == 0.0
    at_listed = min(79 / 98 * order + float(conversion(order, 1e-10)) for order in ORDERS)
    assert zcdp_epsilon(79 / 98, 1e-10) <= at_listed


def test_a_group_costs_three_times_at_twice_the_order() -> None:
    one, orders = [SubsampledGaussian(0.02, 2.0, 10)], [1.5, 2, 4]
    for size, doublings in ((2, 1), (3, 2), (4, 2)):
        costs = order_costs(one, orders, group_size=size)
        assert costs[0] == math.inf
        assert costs[1:] == pytest.approx(3**doublings * order_costs(one, [2 * 2**doublings, 4 * 2**doublings]))


def test_no_noise_costs_infinity_and_no_step_nothing() -> None:
    assert renyi_epsilon([SubsampledGaussian(0.1, 0.0, 1)], 1e-5) == math.inf
    assert renyi_epsilon([SubsampledGaussian(0.1, 0.0, 0)], 1e-5) == 0.0


def test_sites_add_their_largest_costs_at_each_order() -> None:
    sites = [
        [SubsampledGaussian(0.01, 1.0, 100)],
        [SubsampledGaussian(0.1, 3.0, 100)],
        [SubsampledGaussian(1.0, 40.0, 1)],
    ]
    bound = renyi_over_sites(sites, 1e-5, 2)
    pairs = [renyi_epsilon(left + right, 1e-5) for left, right in ((sites[0], sites[1]), (sites[0], sites[2]))]
    assert max(pairs) <= bound <= renyi_epsilon(sum(sites, []), 1e-5)  # noqa: RUF017
