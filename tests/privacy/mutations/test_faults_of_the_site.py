"""Faults of a site's answers: what it executes, states, accepts and publishes. Planted while one test runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import client.policy
import client.rounds
import client.training
import privacy.accounting
import privacy.calibration
import privacy.loss_distributions
from client.site import Site
from client.training import TrainingJob
from finetuning.loop import TrainingDiagnostics
from privacy.mechanisms import SubsampledGaussian
from privacy.plan import PrivacyPlan
from privacy.sampling import PoissonSampling
from protocol.errors import SiteRefusal
from protocol.instructions import Reply

Plant = Callable[[str, object], None]
Catches = Callable[..., None]


@pytest.mark.fault("a site's own cap of steps booked, the plan's steps taken")
def test_capped_steps_booked_and_all_taken(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A site's file asks for fewer steps than the plan; these are booked and stated, and all are executed."""
    monkeypatch.setattr(TrainingJob, "training", property(lambda job: job.header.plan.local))
    catches(18)


@pytest.mark.fault("training ends at a loss that is not finite")
def test_training_ends_at_a_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Fewer steps are taken than are booked, and the update tells that a private loss overflowed."""
    real = client.training.train_locally

    class Ended(Exception):
        pass

    class Watchful:
        def __init__(self, objective: Any) -> None:
            self.objective = objective

        def losses(self, network: Any, batch: Any) -> torch.Tensor:
            losses = self.objective.losses(network, batch)
            if not torch.isfinite(losses).all():
                raise Ended
            return losses

    def ending(adapted: Any, trained: Any, examples: Any, objective: Any, *rest: Any, **options: Any) -> Any:
        try:
            return real(adapted, trained, examples, Watchful(objective), *rest, **options)
        except Ended:
            return TrainingDiagnostics(0, 0, 0.0, 0.0)

    monkeypatch.setattr(client.training, "train_locally", ending)
    catches(18)


@pytest.mark.fault("a round refused for its losses")
def test_a_round_refused_for_its_losses(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A site refuses when a record's loss is not finite, which no noise covers."""
    real = client.rounds.train

    def touchy(*arguments: Any) -> Any:
        trained = real(*arguments)
        if trained.non_finite:
            raise SiteRefusal("site_error", "a loss is not finite")
        return trained

    monkeypatch.setattr(client.rounds, "train", touchy)
    catches(22)


@pytest.mark.fault("a reply counts the steps that drew somebody")
def test_a_reply_counts_the_steps_that_drew_somebody(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """`steps` of a reply leaves out the empty draws, whose number is private."""
    drew: list[bool] = []
    real_draw, real_round = PoissonSampling.draw, client.rounds._round

    def draw(self: PoissonSampling, *arguments: Any) -> list[int]:
        drawn = real_draw(self, *arguments)
        drew.append(bool(drawn))
        return drawn

    def telling(*arguments: Any) -> Reply:
        drew.clear()
        reply = real_round(*arguments)
        return replace(reply, header=reply.header.model_copy(update={"steps": sum(drew)}))

    monkeypatch.setattr(PoissonSampling, "draw", draw)
    monkeypatch.setattr(client.rounds, "_round", telling)
    catches(19)


@pytest.mark.fault("the card publishes the true count")
def test_the_card_publishes_the_true_count(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """`published_records` of a site's card is the number of its records."""
    real = Site.card

    def counting(self: Site, challenge: bytes = b"") -> Any:
        return real(self, challenge).model_copy(update={"published_records": len(self._read())})

    monkeypatch.setattr(Site, "card", counting)
    catches(22)


@pytest.mark.fault("a nested insecure_seed accepted")
def test_a_nested_insecure_seed_accepted(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A site looks for `insecure_seed` in `privacy`, and not in `privacy.local`."""
    real = client.policy._check_privacy

    def lenient(site: Any, header: Any, policy: Any, simulated: bool) -> None:
        nested = getattr(header.plan.privacy, "local", None) is not None and header.plan.privacy.insecure_seed is None
        real(site, header, policy, simulated or nested)

    monkeypatch.setattr(client.policy, "_check_privacy", lenient)
    catches(29)


@pytest.mark.fault("a refusal gives its reason in words")
def test_a_refusal_gives_its_reason_in_words(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """What was meant for the site's log, and may hold figures, goes to the server."""
    real = client.rounds._refusal

    def chatty(instruction: Any, work: Any, code: str, why: Exception) -> Reply:
        reply = real(instruction, work, code, why)
        return replace(reply, header=reply.header.model_copy(update={"reason": str(why)}))

    monkeypatch.setattr(client.rounds, "_refusal", chatty)
    catches(29)


@pytest.mark.fault("sum divided by what the true count expects")
def test_sum_divided_by_what_the_true_count_expects(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The normalizer is rate x true count instead of rate x published count."""
    real = client.rounds.build_plan

    def counting(*arguments: Any, num_units: int, **options: Any) -> PrivacyPlan:
        plan = real(*arguments, num_units=num_units, **options)
        return replace(plan, normalizer=plan.sampling.rate * num_units)

    monkeypatch.setattr(client.rounds, "build_plan", counting)
    catches(22)


@pytest.mark.fault("drawn at the true count's rate, booked at the published one's")
def test_drawn_at_the_rate_of_the_true_count(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The sampling rate is batch size / true count, while the ledger gets batch size / published count."""
    real, mechanism = client.rounds.build_plan, PrivacyPlan.mechanism

    def counting(*arguments: Any, num_units: int, **options: Any) -> PrivacyPlan:
        plan = real(*arguments, num_units=num_units, **options)
        return replace(plan, sampling=replace(plan.sampling, rate=min(1.0, plan.normalizer / num_units)))

    def published(self: PrivacyPlan, steps: int) -> SubsampledGaussian:
        return replace(mechanism(self, steps), sampling_rate=self.normalizer / self.sampling.slots)

    monkeypatch.setattr(client.rounds, "build_plan", counting)
    monkeypatch.setattr(PrivacyPlan, "mechanism", published)
    catches(22)


@pytest.fixture
def fresh_accounts() -> Iterator[None]:
    """What accountants remember is forgotten before a fault, and what they got wrong after it."""
    caches = (
        privacy.accounting._epsilon,
        privacy.calibration.calibrate_noise,
        privacy.loss_distributions.epsilon_on_grid,
        privacy.loss_distributions._remembered,
    )
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_accounts")
@pytest.mark.fault("accountant composes half of the steps")
def test_accountant_composes_half_of_the_steps(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The noise is chosen by the same wrong ε that is stated, so the two agree."""
    real = privacy.loss_distributions._compose

    def half(mechanisms: tuple[SubsampledGaussian, ...], terms: Any) -> Any:
        return real(tuple(each.repeated(max(each.steps // 2, 1)) for each in mechanisms), terms)

    monkeypatch.setattr(privacy.loss_distributions, "_compose", half)
    catches(28)


@pytest.mark.usefixtures("fresh_accounts")
@pytest.mark.fault("accountant samples twice")
def test_accountant_samples_twice(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The rate is squared on the way to the loss distribution, as if a draw were amplified two times."""
    real = privacy.loss_distributions._one_step

    def squared(mechanism: SubsampledGaussian, terms: Any) -> Any:
        return real(replace(mechanism, sampling_rate=mechanism.sampling_rate**2), terms)

    monkeypatch.setattr(privacy.loss_distributions, "_one_step", squared)
    catches(28)


@pytest.mark.fault("released loss not charged")
def test_released_loss_not_charged(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The noised loss leaves beside the gradient, and the ledger holds the gradient's noise alone."""
    real = PrivacyPlan.mechanism
    monkeypatch.setattr(PrivacyPlan, "mechanism", lambda plan, steps: real(replace(plan, loss=None), steps))
    catches(18, "privacy.loss_noise_multiplier=20")
