"""Faults of the clipped sum, planted into the real code while one test runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import client.site
import client.training
import privacy.plan
from client.units import Units
from finetuning.batches import Example, TokenizedRows
from finetuning.summaries import summarized
from privacy.doctor.diagnosis import diagnose, exit_code
from privacy.doctor.subject import Subject
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream

Plant = Callable[[str, object], None]
Catches = Callable[..., None]


class WrittenOut:
    """DP-SGD written out as a loop over single examples. Healthy as it stands; each fault overrides one method."""

    max_micro_batch: int | None = 1
    released_loss = None
    clipped = non_finite = 0

    def __init__(
        self,
        plan: PrivacyPlan,
        _per_example: str,
        _network: object,
        trained: dict[str, Any],
        stream: SecureStream,
        *,
        without_rule: str,
    ) -> None:
        self.plan, self.parameters, self.stream = plan, list(trained.values()), stream
        self.sums = [torch.zeros_like(each) for each in self.parameters]

    def draw(self, num_units: int) -> list[int]:
        return self.plan.sampling.draw(num_units, self.stream)

    def loss(self, losses: torch.Tensor) -> torch.Tensor:
        return losses.sum()

    def factors(self, rows: Sequence[torch.Tensor]) -> list[float]:
        whole = torch.stack([row.norm() for row in rows]).norm()
        return [min(1.0, self.plan.clip_norm / max(float(whole), 1e-30))] * len(rows)

    def accumulate(self, losses: torch.Tensor, owners: torch.Tensor | None = None) -> None:
        rows = torch.autograd.grad(self.loss(losses), self.parameters)
        if not all(bool(torch.isfinite(row).all()) for row in rows):
            return  # it counts as zero
        self.sums = [
            total + factor * row for total, factor, row in zip(self.sums, self.factors(rows), rows, strict=True)
        ]

    def finish(self) -> None:
        deviation = self.plan.noise_multiplier * self.plan.clip_norm
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            noise = torch.from_numpy(self.stream.gaussian(total.numel())).reshape(total.shape) * deviation
            parameter.grad = self.on_the_lattice(total.double() + noise, deviation).float() / self.plan.normalizer
        self.sums = [torch.zeros_like(each) for each in self.parameters]

    @staticmethod
    def on_the_lattice(values: torch.Tensor, deviation: float) -> torch.Tensor:
        """docs/decisions/0005-noise.md."""
        if deviation == 0:
            return values
        spacing = 2.0 ** (math.floor(math.log2(deviation)) - 18)
        return (values / spacing).round() * spacing

    def close(self) -> None:
        pass


def test_the_written_out_loop_is_healthy(plant: Plant, observe: Callable[..., Subject]) -> None:
    """The control: what is caught below is the fault, not the loop that carries it."""
    plant("gradient_rule", WrittenOut)
    assert exit_code(diagnose(observe()).items()) == 0


@pytest.mark.fault("batch-mean clipping")
def test_batch_mean_clipping(plant: Plant, catches: Catches) -> None:
    """The gradient of the micro-batch's mean loss is clipped, not each example's."""

    class OfTheMean(WrittenOut):
        max_micro_batch = None

        def loss(self, losses: torch.Tensor) -> torch.Tensor:
            return losses.mean()

    plant("gradient_rule", OfTheMean)
    catches(12)


@pytest.mark.fault("per-layer clipping with the full norm")
def test_per_layer_clipping_with_the_full_norm(plant: Plant, catches: Catches) -> None:
    """Each tensor is clipped to C on its own, so a record can move the sum by C·√(tensors)."""

    class PerLayer(WrittenOut):
        def factors(self, rows: Sequence[torch.Tensor]) -> list[float]:
            return [min(1.0, self.plan.clip_norm / max(float(row.norm()), 1e-30)) for row in rows]

    plant("gradient_rule", PerLayer)
    catches(13)


@pytest.mark.fault("tied weights left unclipped")
def test_tied_weights_left_unclipped(plant: Plant, catches: Catches) -> None:
    """A tensor's second use is added without clipping: its part of the gradient is in no norm."""

    class TiedUnclipped(WrittenOut):
        def factors(self, rows: Sequence[torch.Tensor]) -> list[float]:
            largest = max(range(len(rows)), key=lambda position: float(rows[position].norm()))
            others = super().factors([row for position, row in enumerate(rows) if position != largest])
            return [*others[:largest], 1.0, *others[largest:]]

    plant("gradient_rule", TiedUnclipped)
    catches(13)


@pytest.mark.fault("no clipping")
def test_no_clipping(plant: Plant, catches: Catches) -> None:
    """Every gradient enters the sum as it is."""

    class Unclipped(WrittenOut):
        def factors(self, rows: Sequence[torch.Tensor]) -> list[float]:
            return [1.0] * len(rows)

    plant("gradient_rule", Unclipped)
    catches(13)


@pytest.mark.fault("loss normalized over the batch")
def test_loss_normalized_over_the_batch(
    plant: Plant, catches: Catches, coupled_objective: Callable[[Any], Any]
) -> None:
    """Each loss is divided by the tokens of the whole micro-batch, as `labels=` of transformers does it."""
    plant("build_objective", coupled_objective)
    # The dry run would refuse it (tests/unit/client/test_dry_run_before_spending.py); here the doctor has to see it.
    plant("way_of_gradients", lambda *_: "native")
    plant("_check_of_training", lambda *_: None)  # it sees rows that differ, and has them computed alone
    catches(12)


@pytest.mark.fault("example counted twice by augmentation")
def test_example_counted_twice_by_augmentation(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Each record becomes two examples, sampled and clipped as if they were two people's."""
    tokenize, units_of = client.site.tokenize_as_configured, client.site.units_of

    def augmented(*arguments: Any, **options: Any) -> TokenizedRows:
        once = tokenize(*arguments, **options)
        return TokenizedRows(once.examples * 2, once.report)

    def twice(*arguments: Any) -> Units:
        once = units_of(*arguments)
        return Units((*once.members, *((at + len(once),) for (at,) in once.members)), once.names * 2)

    monkeypatch.setattr(client.site, "tokenize_as_configured", augmented)
    monkeypatch.setattr(client.site, "units_of", twice)
    # Where every record publishes a slot, more examples than slots are refused before anything is trained.
    monkeypatch.setattr(privacy.plan, "_refuse_too_few_slots", lambda *_: None)
    catches(13)


@pytest.mark.fault("adapter not wired in")
def test_adapter_not_wired_in(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Steps are taken on copies of the parameters: ε is spent, and nothing is learned."""
    real = client.training.train_locally

    def on_copies(adapted: Any, trained: Any, *rest: Any, **options: Any) -> Any:
        start = adapted.extract()
        diagnostics = real(adapted, trained, *rest, **options)
        adapted.load(start)
        return diagnostics

    monkeypatch.setattr(client.training, "train_locally", on_copies)
    catches(10)


@pytest.mark.fault("base trained along")
def test_base_trained_along(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A frozen tensor moves during training; it is in no clipped sum."""
    real = client.training.train_locally
    moved: list[tuple[torch.Tensor, torch.Tensor]] = []

    def leaking(adapted: Any, *rest: Any, **options: Any) -> Any:
        frozen = next(each for each in adapted.network.parameters() if not each.requires_grad)
        moved.append((frozen, frozen.detach().clone()))
        with torch.no_grad():
            frozen.add_(1e-3)
        return real(adapted, *rest, **options)

    monkeypatch.setattr(client.training, "train_locally", leaking)
    try:
        catches(11)
    finally:
        # The base is shared by every test of this process.
        with torch.no_grad():
            moved[0][0].copy_(moved[0][1])


@pytest.mark.fault("sum divided by the true batch size")
def test_sum_divided_by_the_true_batch_size(plant: Plant, catches: Catches) -> None:
    """The normalizer follows from what was drawn, so the release tells it, and a neighbor rescales it."""

    class ByCount(WrittenOut):
        count = 0

        def accumulate(self, losses: torch.Tensor, owners: torch.Tensor | None = None) -> None:
            super().accumulate(losses, owners)
            self.count += len(losses)

        def finish(self) -> None:
            super().finish()
            for parameter in self.parameters:
                parameter.grad *= self.plan.normalizer / max(self.count, 1)
            self.count = 0

    plant("gradient_rule", ByCount)
    catches(14)


@pytest.mark.fault("summaries centred on the site's own mean")
def test_summaries_centred_on_the_sites_own_mean(plant: Plant, head_alone: tuple[str, ...], catches: Catches) -> None:
    """What a head reads is shifted by the mean over the site's records, so each is in every other one's gradient."""

    def centred(*arguments: Any, **options: Any) -> tuple[Example, ...]:
        made = summarized(*arguments, **options)
        mean = np.mean([example.summary for example in made if example.summary is not None], axis=0)
        return tuple(replace(example, summary=example.summary - mean) for example in made)

    plant("summarized", centred)
    catches(13, *head_alone)
