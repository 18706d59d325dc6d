"""Faults of noise and sampling, planted into the real code while one test runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import client.training
from privacy.gradients import gradient_rule
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling

Plant = Callable[[str, object], None]
Catches = Callable[..., None]


class ByRule:
    """The real gradient rule, for faults that act before or after it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.plan: PrivacyPlan = arguments[0]
        self.trained: dict[str, Any] = arguments[3]
        self.real = gradient_rule(*arguments, **options)
        self.drawn = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def draw(self, num_units: int) -> list[int]:
        drawn = self.real.draw(num_units)
        self.drawn = len(drawn)
        return drawn


@pytest.mark.fault("noise scaled by the actual batch")
def test_noise_scaled_by_the_actual_batch(plant: Plant, catches: Catches) -> None:
    """The noised sum is divided by the number of drawn records instead of the expected one."""

    class ByActual(ByRule):
        def finish(self) -> None:
            self.real.finish()
            for parameter in self.trained.values():
                parameter.grad *= self.plan.normalizer / max(self.drawn, 1)

    plant("gradient_rule", ByActual)
    catches(15)


def with_noise(monkey: pytest.MonkeyPatch, change: Callable[[PrivacyPlan, Any], Any]) -> None:
    """Change the noise that every plan hands out."""
    real = PrivacyPlan.noise
    monkey.setattr(PrivacyPlan, "noise", lambda plan, dimension: change(plan, real(plan, dimension)))


@pytest.mark.fault("noise divided by √batch")
def test_noise_divided_by_the_root_of_the_batch(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Averaging is thought to shrink the noise once more."""
    with_noise(monkeypatch, lambda plan, noise: replace(noise, multiplier=noise.multiplier / plan.normalizer**0.5))
    catches(15)


@pytest.mark.fault("noise forgotten for the head")
def test_noise_forgotten_for_the_head(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The last trained tensor gets its sum without noise."""

    class Forgetful:
        def __init__(self, noise: Any) -> None:
            self.noise = noise

        def __getattr__(self, name: str) -> Any:
            return getattr(self.noise, name)

        def add_drawn(self, sums: Sequence[torch.Tensor], drawn: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return (*self.noise.add_drawn(sums, drawn)[:-1], sums[-1].float())

    with_noise(monkeypatch, lambda _plan, noise: Forgetful(noise))
    catches(15)


@pytest.mark.fault("same generator seed each round")
def test_same_generator_seed_each_round(plant: Plant, catches: Catches) -> None:
    """Sampling and noise of every round come from one fixed seed, so that two updates subtract to a clear one."""

    def seeded(plan: PrivacyPlan, native: str, network: Any, trained: Any, _: SecureStream, **options: Any) -> Any:
        return gradient_rule(plan, native, network, trained, SecureStream.insecure(1), **options)

    plant("gradient_rule", seeded)
    catches(16)


@pytest.mark.fault("noise drawn ahead and used again")
def test_noise_drawn_ahead_and_used_again(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Every step of a round gets the noise that was drawn for its first step."""

    class Once:
        def __init__(self, noise: Any, like: Sequence[torch.Tensor], stream: SecureStream, _steps: int) -> None:
            self.noise, self.drawn = noise, noise.draw(like, stream.child("noise"))

        def add(self, sums: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return self.noise.add_drawn(sums, tuple(each.clone() for each in self.drawn))

        def close(self) -> None:
            pass

    monkeypatch.setattr("privacy.example_level.NoiseAhead", Once)
    catches(16)


@pytest.mark.fault("shuffling instead of Poisson")
def test_shuffling_instead_of_poisson(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Epochs of a shuffled order are cut into batches of the expected size."""
    left: list[int] = []

    def shuffled(self: PoissonSampling, num_units: int, stream: SecureStream) -> list[int]:
        size = round(self.rate * self.slots)
        if len(left) < size:
            left[:] = stream.uniform(num_units).argsort().tolist()
        batch, left[:] = left[:size], left[size:]
        return sorted(position for position in batch if position < num_units)

    monkeypatch.setattr(PoissonSampling, "draw", shuffled)
    catches(17)


@pytest.mark.fault("drawn more often than booked")
def test_drawn_more_often_than_booked(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Each record is drawn with 1.25 times the booked rate."""
    real = PoissonSampling.draw

    def eager(self: PoissonSampling, num_units: int, stream: SecureStream) -> list[int]:
        return real(replace(self, rate=min(1.25 * self.rate, 1.0)), num_units, stream)

    monkeypatch.setattr(PoissonSampling, "draw", eager)
    catches(17)


@pytest.mark.fault("empty batches skipped")
def test_empty_batches_skipped(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A step without records takes no noise and no update, which tells that nobody was drawn."""
    real = client.training.train_locally

    def skipping(adapted: Any, trained: Any, examples: Any, objective: Any, rule: Any, local: Any, **options: Any):
        draws = [rule.draw(len(options["units"])) for _ in range(local.steps)]
        kept = [drawn for drawn in draws if drawn]
        if not kept:
            return real(adapted, trained, examples, objective, rule, local.model_copy(update={"steps": 0}), **options)
        waiting = iter(kept)
        monkeypatch.setattr(rule, "draw", lambda _num_units: next(waiting), raising=False)
        steps = local.model_copy(update={"steps": len(kept)})
        return real(adapted, trained, examples, objective, rule, steps, **options)

    monkeypatch.setattr(client.training, "train_locally", skipping)
    catches(19)
