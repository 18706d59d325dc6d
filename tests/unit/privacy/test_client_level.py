"""The client-level plan: what is booked, what one site can change, and noise that is what was booked."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema.federation import Federation
from conf.schema.privacy import AdaptiveClip, ClientLevel
from privacy.adaptive_clip import next_clip_norm, update_noise_multiplier
from privacy.client_level import (
    ClientLevelPlan,
    bounded_weights,
    build_client_level_plan,
    clip_update,
    update_norm,
)
from privacy.client_release import ClientLevelRelease, ClippedSum
from privacy.mechanisms import SubsampledGaussian
from privacy.randomness import SecureStream
from protocol.errors import PrivacyError
from protocol.tensors import layout_of

TEN = {f"site-{number}": 1.0 for number in range(10)}
UPDATE = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
WIDE = {"a": torch.zeros(100, 50), "b": torch.zeros(15_000)}


def plan(weights: dict[str, float] = TEN, federation: dict[str, Any] | None = None, **privacy: Any) -> ClientLevelPlan:
    asked = ClientLevel.model_validate({"noise_multiplier": 2.0} | privacy)
    return build_client_level_plan(asked, Federation.model_validate({"rounds": 4} | (federation or {})), weights)


def test_a_known_cohort_amplifies_nothing_and_is_booked_every_round() -> None:
    made = plan(federation={"cohort_size": 5})
    assert made.mechanism(3) == SubsampledGaussian(1.0, 2.0, 1)
    assert made.whole_run == SubsampledGaussian(1.0, 2.0, 4)
    assert "who is asked may be known" in made.relation


def test_a_secret_cohort_is_booked_at_its_rate_and_says_against_whom() -> None:
    made = plan(federation={"cohort_size": 2, "cohort_sampling": "poisson"})
    assert made.whole_run == SubsampledGaussian(0.2, 2.0, 4)
    assert made.normalizer == pytest.approx(2)
    assert "probability 0.2, in secret, which amplifies nothing against the server" in made.relation


def test_correlated_noise_is_one_mechanism_booked_before_round_1() -> None:
    made = plan(noise={"kind": "tree", "min_separation": 1, "max_participations": 4})
    assert made.mechanism(1) == made.whole_run == SubsampledGaussian(1.0, 2.0, 1)
    assert made.mechanism(2) == made.whole_run.repeated(0)
    # 4 participations under 4 leaves: 4 x 1 + 2 x 4 + 16.
    assert made.sensitivity == pytest.approx(math.sqrt(28))
    assert "at most 4 times, 1 or more rounds apart" in made.relation


def test_the_target_is_met_for_all_rounds_together() -> None:
    made = plan(target_epsilon=4.0, noise_multiplier=None)
    assert made.delta == pytest.approx(1 / 100)
    assert 0.99 * 4 <= made.epsilon([made.whole_run]) <= 4.0


def test_delta_of_one_over_the_sites_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"privacy.delta=0.1 is not below 1/10 sites: .* use at most 0.01, or null"):
        plan(delta=0.1)
    assert plan(delta=0.0999).delta == 0.0999


def test_a_plan_needs_one_of_target_and_noise() -> None:
    with pytest.raises(PrivacyError, match="neither is set"):
        plan(noise_multiplier=None)


def test_weights_are_public_bounded_and_scale_the_noise() -> None:
    counts = {"small": 100, "middle": 300, "large": 1400}
    weights = bounded_weights(counts, "published_records", max_weight=2.0)
    assert weights == pytest.approx({"small": 1 / 6, "middle": 0.5, "large": 2.0})
    assert bounded_weights(counts, "uniform", 2.0) == dict.fromkeys(counts, 1.0)
    made = plan(weights, clip_norm=0.5)
    assert made.normalizer == pytest.approx(sum(weights.values()))
    assert made.noise(0.5).standard_deviation == pytest.approx(2.0 * 0.5 * 2.0)
    with pytest.raises(ValueError, match=r"weight=2.1 is not in \(0, 2.0\]"):
        ClippedSum(layout_of(UPDATE), 1.0, made.max_weight).accumulate(UPDATE, 2.1)


def test_clipping_bounds_the_whole_update_and_nothing_else() -> None:
    clipped, below = clip_update(UPDATE, 1.0)
    assert not below
    assert update_norm(clipped) == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(clipped["b"], torch.tensor([[0.8]]))
    same, below = clip_update(UPDATE, 5.0)
    assert below
    assert all(torch.equal(same[name], UPDATE[name]) for name in UPDATE)
    zero, below = clip_update({"a": torch.zeros(3)}, 1e-6)
    assert below
    assert not zero["a"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="the update is not finite and cannot be clipped"):
        clip_update({"a": torch.tensor([1.0, bad])}, 1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3), st.floats(0.05, 2.0))
def test_one_site_changes_the_sum_by_at_most_clip_times_weight(values: list[float], clip: float, weight: float) -> None:
    """Whatever arrives: also an update that its site did not clip."""
    update = {"a": torch.tensor(values)}
    total = ClippedSum(layout_of(update), clip, 2.0)
    total.accumulate(update, weight)
    assert float(total.parts["a"].norm()) <= clip * weight * (1 + 1e-12)


def released(made: ClientLevelPlan, updates: list[dict[str, torch.Tensor]], seed: int = 0) -> dict[str, torch.Tensor]:
    release = ClientLevelRelease(made)
    total = release.new_sum(layout_of(WIDE))
    for update in updates:
        total.accumulate(update, 1.0)
    return release.release(total, SecureStream.insecure(seed, "test"))


def test_noise_has_the_calibrated_deviation_also_on_an_empty_cohort() -> None:
    """20,000 values: the estimate's relative deviation is 0.5 %, five of them are allowed (error rate 6e-7 a case)."""
    for updates in ([], [{name: torch.full(part.shape, 1e-3) for name, part in WIDE.items()}] * 3):
        made = plan(noise_multiplier=3.0, clip_norm=0.7, federation={"cohort_size": 5})
        mean = 1e-3 * len(updates) / 5
        noise = torch.cat([part.flatten() for part in released(made, updates).values()]).double() - mean
        expected = 3.0 * 0.7 / 5
        assert float(noise.square().mean().sqrt()) == pytest.approx(expected, rel=5 / math.sqrt(2 * 20_000))
        assert abs(float(noise.mean())) < 5 * expected / math.sqrt(20_000)


def test_next_to_no_noise_leaves_the_exact_weighted_sum_over_the_normalizer() -> None:
    made = replace(plan(clip_norm=1e6), noise_multiplier=1e-12)
    generator = torch.Generator().manual_seed(0)
    updates = [{name: torch.randn(part.shape, generator=generator) for name, part in WIDE.items()} for _ in range(3)]
    found = released(made, updates)
    for name in WIDE:
        mean = sum(update[name].double() for update in updates) / 10
        torch.testing.assert_close(found[name], torch.as_tensor(mean).float(), rtol=1e-5, atol=1e-5)


def test_correlated_releases_add_up_to_the_prefix_noise_that_was_promised() -> None:
    """Four rounds of a tree: 20,000 values, error rate 6e-7 a round."""
    limits = {"kind": "tree", "min_separation": 1, "max_participations": 4}
    made = plan(noise=limits, noise_multiplier=1.5, clip_norm=2.0)
    release, prefix = ClientLevelRelease(made), torch.zeros(20_000, dtype=torch.float64)
    for number, variance in enumerate(made.factorization.prefix_variances(4)):
        stream = SecureStream.insecure(7, "round", number)
        parts = release.release(release.new_sum(layout_of(WIDE)), stream)
        prefix += torch.cat([part.flatten() for part in parts.values()]).double()
        expected = 1.5 * math.sqrt(28) * 2.0 * math.sqrt(variance) / 10
        assert float(prefix.square().mean().sqrt()) == pytest.approx(expected, rel=5 / math.sqrt(2 * 20_000))


@settings(deadline=None, max_examples=50)
@given(st.floats(0.2, 50), st.floats(1.01, 100))
def test_updates_and_count_are_together_one_release(noise_multiplier: float, surplus: float) -> None:
    """Andrew et al. 2021, theorem 1: squared inverse multipliers add up; the count's sensitivity is 1/2."""
    count_noise = noise_multiplier / 2 * surplus
    updates = update_noise_multiplier(noise_multiplier, count_noise)
    assert updates**-2 + (count_noise / 0.5) ** -2 == pytest.approx(noise_multiplier**-2)


def test_adaptive_clipping_golden_figures() -> None:
    """z = 1 and σ_b = 5, of a cohort of 100 as in the paper: z_Δ = 1.00504; 80 of 100 below the norm shrink it."""
    assert update_noise_multiplier(1.0, 5.0) == pytest.approx(1.005038, abs=1e-6)
    config = AdaptiveClip(quantile=0.5, learning_rate=0.2, count_noise=5)
    assert next_clip_norm(1.0, 80 * 0.5 - 20 * 0.5, 100, config) == pytest.approx(math.exp(-0.2 * 0.3))
    assert next_clip_norm(2.0, 0.0, 100, config) == pytest.approx(2.0)
    with pytest.raises(PrivacyError, match=r"count_noise=0.5 spends the whole ε .* multiplier of 2; use more than 1"):
        plan(clipping={"kind": "adaptive", "count_noise": 0.5})


def test_the_clip_norm_finds_the_quantile() -> None:
    """Norms 0.1, 0.2, ..., 2.0: half lie below 1.05. The count's noise of 1 in 20 sites moves it by a few percent."""
    weights = {f"site-{number}": 1.0 for number in range(20)}
    made = plan(weights, clip_norm=0.1, noise_multiplier=1.0, clipping={"kind": "adaptive", "count_noise": 1.0})
    release, norms = ClientLevelRelease(made), []
    for number in range(150):
        total = release.new_sum({"a": layout_of({"a": torch.zeros(1)})["a"]})
        for site in range(1, 21):
            update, below = clip_update({"a": torch.tensor([0.1 * site])}, release.clip_norm)
            total.accumulate(update, 1.0, below)
        release.release(total, SecureStream.insecure(3, number))
        norms.append(release.clip_norm)
    assert np.median(norms[60:]) == pytest.approx(1.05, abs=0.15)


def test_the_count_is_noised_with_its_own_deviation() -> None:
    """2000 empty rounds: ln C moves by -η (noise / m + 1/2 - γ); error rate 6e-7."""
    made = plan(clipping={"kind": "adaptive", "count_noise": 4.0, "learning_rate": 1.0})
    release, steps = ClientLevelRelease(made), []
    for number in range(2000):
        before = release.clip_norm
        release.release(release.new_sum(layout_of({"a": torch.zeros(1)})), SecureStream.insecure(5, number))
        steps.append(math.log(release.clip_norm / before))
    assert np.std(steps) == pytest.approx(4.0 / 10, rel=5 / math.sqrt(2 * 2000))
