"""Faults of randomness that can be foreseen, and of what is released beside or below the noise, planted in one test."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import client.training
import privacy.ledger.keys
from client.state import SiteState
from privacy.gradients import gradient_rule
from privacy.ledger import Ledger
from privacy.noise import GaussianNoise
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.released_loss import ReleasedLoss
from privacy.sampling import PoissonSampling
from protocol.errors import ReplayDiverged

Plant = Callable[[str, object], None]
Catches = Callable[..., None]
LOSS = "privacy.loss_noise_multiplier=20"


class ByRule:
    """The real gradient rule, for faults that act beside it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.plan: PrivacyPlan = arguments[0]
        self.real = gradient_rule(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.fault("records drawn from a public seed")
def test_records_drawn_from_a_public_seed(plant: Plant, catches: Catches) -> None:
    """The noise is secret; who is drawn follows from a seed that everybody knows, so nothing is amplified."""

    class Public(ByRule):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.public = SecureStream.insecure(7)

        def draw(self, num_units: int) -> list[int]:
            return self.plan.sampling.draw(num_units, self.public)

    plant("gradient_rule", Public)
    catches(24)


@pytest.mark.fault("records drawn by the round's number")
def test_records_drawn_by_the_number_of_the_round(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The noise is secret; who is drawn follows from the run's name and the round."""
    made: list[tuple[SecureStream, SecureStream]] = []
    stream, draw = client.training.TrainingJob.stream, PoissonSampling.draw

    def noted(self: Any, secret: bytes, attempt: int) -> SecureStream:
        own = stream(self, secret, attempt)
        made.append((own, SecureStream.insecure(0, self.header.plan.run, self.header.round)))
        return own

    def public(self: PoissonSampling, num_units: int, own: SecureStream) -> list[int]:
        return draw(self, num_units, next((public for secret, public in made if secret is own), own))

    monkeypatch.setattr(client.training.TrainingJob, "stream", noted)
    monkeypatch.setattr(PoissonSampling, "draw", public)
    catches(24)


@pytest.mark.fault("public dropout seed")
def test_public_dropout_seed(plant: Plant, catches: Catches) -> None:
    """Masks depend on who else was drawn; with a seed that is known, they tell of it."""
    plant("_dropout_seed", lambda _stream: 0)
    catches(24)


@pytest.mark.fault("site secret made from the site's name")
def test_site_secret_made_from_the_name_of_the_site(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Whoever knows the name can subtract the noise."""
    secret = property(lambda self: hashlib.sha256(self._site.name.encode()).digest())
    monkeypatch.setattr(SiteState, "secret", secret)
    catches(24)


@pytest.mark.fault("site secret from a seeded generator")
def test_site_secret_from_a_seeded_generator(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Python's `random` makes the secret, which every training program seeds."""
    monkeypatch.setattr(privacy.ledger.keys, "secrets", SimpleNamespace(token_bytes=random.randbytes))
    catches(24)


@pytest.mark.fault("site secret of few bytes")
def test_site_secret_of_few_bytes(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Four random bytes, filled up to the length of a key."""
    few = SimpleNamespace(token_bytes=lambda count: random.SystemRandom().randbytes(4).ljust(count, b"\0"))
    monkeypatch.setattr(privacy.ledger.keys, "secrets", few)
    catches(24)


@pytest.mark.fault("noise not bound to its inputs")
def test_noise_not_bound_to_its_inputs(plant: Plant, catches: Catches) -> None:
    """A round has one stream, whatever was sent: where the ledger was lost, two adapters get the same noise."""

    def by_round(secret: bytes, *, run: str, round_number: int, inputs_digest: str, attempt: int) -> SecureStream:
        return SecureStream.derived(secret, "round", run, round_number, attempt)

    plant("round_stream", by_round)
    catches(24)


@pytest.mark.fault("noise seeded by public facts")
def test_noise_seeded_by_public_facts(plant: Plant, catches: Catches) -> None:
    """Run, round and attempt make the stream, and no secret."""

    def public(_secret: bytes, *, run: str, round_number: int, inputs_digest: str, attempt: int) -> SecureStream:
        return SecureStream.insecure(0, run, round_number, attempt)

    plant("round_stream", public)
    catches(24)


@pytest.mark.fault("site secret as the whole key of a stream")
def test_site_secret_used_again_in_every_round(plant: Plant, catches: Catches) -> None:
    """Every round starts the secret's stream anew, so two updates subtract to a clear one."""
    plant("round_stream", lambda secret, **_: SecureStream.derived(secret, "noise"))
    catches(16)


@pytest.mark.fault("a repeated question answered with fresh noise for nothing")
def test_fresh_noise_for_a_repeated_question(plant: Plant, monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Asking again and again, and taking the mean, removes the noise; the ledger counts one round."""
    real = Ledger.commit

    def tolerant(self: Ledger, *arguments: Any) -> None:
        with suppress(ReplayDiverged):
            real(self, *arguments)

    plant("round_stream", lambda *_, **__: SecureStream.from_operating_system())
    monkeypatch.setattr(Ledger, "commit", tolerant)
    catches(24)


class Changed:
    """The real noise, for faults that change one of its methods."""

    def __init__(self, noise: Any) -> None:
        self.noise = noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.noise, name)


def with_noise(monkey: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Change the noise that every plan hands out."""
    real = PrivacyPlan.noise
    monkey.setattr(PrivacyPlan, "noise", lambda plan, dimension: change(real(plan, dimension)))


@pytest.mark.fault("noise scaled by the norm of the sum")
def test_noise_scaled_by_the_norm_of_the_sum(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A long sum gets less noise, so the noise is not the promised one and tells the un-noised norm."""

    class Scaled(Changed):
        def add_drawn(self, sums: Sequence[torch.Tensor], drawn: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            norm = torch.stack([each.double().norm() for each in sums]).norm()
            factor = 1 / (1 + norm / self.noise.clip_norm)
            return self.noise.add_drawn(sums, tuple(each * factor for each in drawn))

    with_noise(monkeypatch, Scaled)
    catches(25)


@pytest.mark.fault("release scaled to the norm of the sum")
def test_release_scaled_to_the_norm_of_the_sum(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The noised sum is brought back to the un-noised length, which is thereby told."""

    class Rescaled(Changed):
        def add_drawn(self, sums: Sequence[torch.Tensor], drawn: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            norm = torch.stack([each.double().norm() for each in sums]).norm()
            noised = self.noise.add_drawn(sums, drawn)
            if norm == 0:
                return noised
            factor = float(norm / torch.stack([each.double().norm() for each in noised]).norm())
            return tuple(each * factor for each in noised)

    with_noise(monkeypatch, Rescaled)
    catches(25)


@pytest.mark.fault("noise of 16 bits")
def test_noise_of_16_bits(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Noise is drawn in bf16: a few thousand values, so that the low bits of a sum show through."""

    class Coarse(Changed):
        def draw(self, like: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
            return tuple(each.bfloat16().double() for each in self.noise.draw(like, stream))

    with_noise(monkeypatch, Coarse)
    catches(26)


@pytest.mark.fault("lattice before the noise")
def test_lattice_before_the_noise(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The sum is rounded to the lattice, and the noise is added to it as it is."""

    class Early(Changed):
        def add_drawn(self, sums: Sequence[torch.Tensor], drawn: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            noise = self.noise
            if noise.standard_deviation == 0:
                return noise.add_drawn(sums, drawn)
            return tuple(
                ((each.double() / noise.spacing).round() * noise.spacing + one * noise.standard_deviation).float()
                for each, one in zip(sums, drawn, strict=True)
            )

    with_noise(monkeypatch, Early)
    catches(26)


@pytest.mark.fault("clipped to another norm than the noise is for")
def test_clipped_to_another_norm(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Gradients are clipped to 2 C, the noise is scaled to C."""
    monkeypatch.setattr(GaussianNoise, "clip_norm", property(lambda noise: 2 * noise.sensitivity))
    catches(13)


@pytest.mark.fault("owners dropped on the way to the clip")
def test_owners_dropped_on_the_way_to_the_clip(plant: Plant, catches: Catches) -> None:
    """User-level: a user is drawn with all records, and each record is clipped on its own."""

    class Ownerless(ByRule):
        def accumulate(self, losses: torch.Tensor, owners: torch.Tensor | None = None) -> None:
            self.real.accumulate(losses)

    plant("gradient_rule", Ownerless)
    catches(13, "privacy=user_level", "federation.local.expected_batch_size=5", "privacy.user_gradient=sum")


@pytest.mark.fault("released loss without noise")
def test_released_loss_without_noise(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The bounded sum of losses leaves as it is, under a metric's name that promises noise."""

    class Silent(Changed):
        def add(self, sums: Sequence[torch.Tensor], _stream: SecureStream) -> tuple[torch.Tensor, ...]:
            return tuple(sums)

    changed_loss(monkeypatch, Silent)
    catches(27, LOSS)


@pytest.mark.fault("released loss with noise divided by √2")
def test_released_loss_with_too_little_noise(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The loss and the gradient share one noise multiplier between them, as if each had half of the variance."""
    changed_loss(monkeypatch, lambda noise: replace(noise, multiplier=noise.multiplier / 2**0.5))
    catches(27, LOSS)


@pytest.mark.fault("released loss without bound")
def test_released_loss_without_bound(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """One record's huge loss is in the sum as it is."""

    def unbounded(self: Any, unit_losses: torch.Tensor) -> None:
        self._step = self._step + unit_losses.nan_to_num(0.0, 0.0, 0.0).sum().cpu()

    monkeypatch.setattr(ReleasedLoss, "accumulate", unbounded)
    catches(27, LOSS)


def changed_loss(monkey: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Change the noise of every released loss."""
    real = ReleasedLoss.__init__

    def made(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self._noise = change(self._noise)

    monkey.setattr(ReleasedLoss, "__init__", made)


@pytest.mark.fault("cap booked and not applied")
def test_cap_booked_and_not_applied(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A draw above the cap stays as it is."""
    real = PoissonSampling.draw
    monkeypatch.setattr(PoissonSampling, "draw", lambda self, *rest: real(replace(self, cap=None), *rest))
    catches(17)


@pytest.mark.fault("cap among records instead of slots")
def test_cap_among_records_instead_of_slots(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Empty slots are dropped before the cut, so whether one is filled changes who else is kept."""

    def late(self: PoissonSampling, num_units: int, stream: SecureStream) -> list[int]:
        drawn = np.flatnonzero(stream.uniform(self.slots) < self.rate)
        drawn = drawn[drawn < num_units]
        if self.truncation is not None and len(drawn) > self.truncation.cap:
            kept = np.argsort(stream.uniform(len(drawn)), kind="stable")[: self.truncation.cap]
            drawn = np.sort(drawn[kept])
        return drawn.tolist()

    monkeypatch.setattr(PoissonSampling, "draw", late)
    catches(17)


@pytest.mark.fault("cap keeps the first records")
def test_cap_keeps_the_first_records(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A draw above the cap is cut at its end instead of at random."""
    real = PoissonSampling.draw

    def cut(self: PoissonSampling, num_units: int, stream: SecureStream) -> list[int]:
        return real(replace(self, cap=None), num_units, stream)[: self.cap]

    monkeypatch.setattr(PoissonSampling, "draw", cut)
    catches(17)
