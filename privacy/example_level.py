"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): per-example gradients, clipped, summed, noised.

Per-example gradients come from `privacy.per_example`, from Opacus' hooks, or from one backward pass per unit. Opacus'
`PrivacyEngine.make_private` is not used, because it derives rate, steps and normalizer from the private number of
records, crashes or releases a fake gradient on an empty batch, lets one infinite gradient poison the sum, and draws
noise from torch's global generator (docs/decisions/0003).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import nn

from privacy.clipping import ClippedSum, clipped_sum, sum_by_unit
from privacy.noise import NoiseAhead
from privacy.per_example import ONE_BY_ONE, IndependentRows, PatchedForwards, Recorder
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.released_loss import ReleasedLoss
from protocol.errors import PrivacyError

__all__ = ["NativeGradients", "NoisySum", "OneByOneGradients", "OpacusGradients", "layers_without_opacus_rule"]


class NoisySum(ABC):
    """What all ways of clipping share: the running clipped sum, and the noised result."""

    max_micro_batch: int | None = None

    def __init__(self, plan: PrivacyPlan, trained: Mapping[str, nn.Parameter], stream: SecureStream) -> None:
        self._plan = plan
        self._trained = trained
        self._stream = stream
        self._noise = plan.noise(sum(parameter.numel() for parameter in trained.values()))
        self._sums: tuple[torch.Tensor, ...] | None = None
        self._loss = None if plan.loss is None else ReleasedLoss(plan, plan.loss)
        self.clipped = 0
        self.non_finite = 0

    @property
    def released_loss(self) -> float | None:
        """The noised mean loss of the finished steps, or None where the plan releases none."""
        return None if self._loss is None else self._loss.value

    @cached_property
    def _ahead(self) -> NoiseAhead:
        return NoiseAhead(self._noise, tuple(self._trained.values()), self._stream, self._plan.steps_per_round)

    def draw(self, num_units: int) -> list[int]:
        """Return the positions of the units that this step uses: a Poisson sample at the plan's rate."""
        _ = self._ahead  # the first step's noise is drawn from now on, beside the gradients
        return self._plan.sampling.draw(num_units, self._stream)

    def accumulate(self, losses: torch.Tensor, owners: torch.Tensor | None = None) -> None:
        """Take one micro-batch's per-example losses, shape (examples,), through the backward pass.

        Args:
            losses: each a function of its own example alone.
            owners: int64, shape (examples,): the unit of each example within this micro-batch; -1 for a padding row,
                which adds nothing. None: each example is a unit of its own. All examples of a unit are in one call.

        Raises:
            PrivacyError: naming a parameter whose gradient is missing, or not one per example.
        """
        if owners is None:
            owners = torch.arange(len(losses), device=losses.device)
        result = self._clipped(losses, owners)
        if self._sums is None:
            self._sums = result.sums
        else:
            for total, part in zip(self._sums, result.sums, strict=True):
                total += part
        self.clipped += result.clipped
        self.non_finite += result.non_finite
        if self._loss is not None:
            self._loss.accumulate(sum_by_unit([losses.detach()], owners)[0])

    def finish(self) -> None:
        """Write (clipped sum + noise) / normalizer into `.grad`; an empty draw still takes its noise."""
        sums = self._sums or tuple(self._noise.zeros(parameter) for parameter in self._trained.values())
        self._sums = None
        for parameter, noised in zip(self._trained.values(), self._ahead.add(sums), strict=True):
            parameter.grad = (noised / self._plan.normalizer).to(parameter.dtype)
        if self._loss is not None:
            self._loss.finish(self._stream)

    def close(self) -> None:
        """End the drawing of noise."""
        if "_ahead" in self.__dict__:
            self._ahead.close()

    @abstractmethod
    def _clipped(self, losses: torch.Tensor, owners: torch.Tensor) -> ClippedSum:
        """Return the sum over units of their clipped gradients."""


class _PerUnit(NoisySum):
    """Clips the units' gradients themselves."""

    @abstractmethod
    def per_unit(self, losses: torch.Tensor, owners: torch.Tensor) -> list[torch.Tensor]:
        """Return each unit's unclipped gradient, one tensor of shape (units, *parameter shape) per parameter.

        What `accumulate` clips and sums, with the same arguments.
        """

    def _clipped(self, losses: torch.Tensor, owners: torch.Tensor) -> ClippedSum:
        return clipped_sum(self.per_unit(losses, owners), self._noise.clip_norm, self._noise.fold)


class NativeGradients(_PerUnit):
    """All examples of a micro-batch in one backward pass, through the rules of `privacy.per_example`."""

    def __init__(
        self,
        plan: PrivacyPlan,
        network: nn.Module,
        trained: Mapping[str, nn.Parameter],
        stream: SecureStream,
    ) -> None:
        super().__init__(plan, trained, stream)
        self._recorder = Recorder(trained)
        self._patched = PatchedForwards(network, trained, self._recorder)
        self._rows = IndependentRows(network)

    def close(self) -> None:
        """Put the layers' own forwards back."""
        super().close()
        self._rows.close()
        self._patched.close()

    def per_unit(self, losses: torch.Tensor, owners: torch.Tensor) -> list[torch.Tensor]:
        """Return each unit's gradient from one backward pass of all losses."""
        return sum_by_unit(self._recorder.backward(losses), owners)


class OneByOneGradients(_PerUnit):
    """One unit per backward pass: exact whatever the layers are."""

    max_micro_batch: int | None = 1

    def per_unit(self, losses: torch.Tensor, owners: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradient of the one unit, shape (1, *parameter shape)."""
        if int(owners.max()) > 0:
            raise ValueError(f"one unit at a time, not {int(owners.max()) + 1}; privacy.gradients allows no more here")
        for parameter in self._trained.values():
            parameter.grad = None
        losses[owners >= 0].sum().backward()
        return [self._taken(parameter) for parameter in self._trained.values()]

    @staticmethod
    def _taken(parameter: nn.Parameter) -> torch.Tensor:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
        return gradient[None]


class OpacusGradients(_PerUnit):
    """All examples of a micro-batch in one backward pass, through Opacus' hooks."""

    def __init__(
        self,
        plan: PrivacyPlan,
        network: nn.Module,
        trained: Mapping[str, nn.Parameter],
        stream: SecureStream,
    ) -> None:
        super().__init__(plan, trained, stream)
        # The losses are summed, so each hook sees the gradient of the example's own loss.
        self._hooks = GradSampleHooks(network, batch_first=True, loss_reduction="sum", strict=True)
        self._rows = IndependentRows(network)
        self._network = network

    def close(self) -> None:
        """Remove the hooks."""
        super().close()
        self._rows.close()
        self._hooks.cleanup()
        for module in self._network.modules():
            # What a forward pass whose backward failed has left: the whole batch's activations.
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)

    def per_unit(self, losses: torch.Tensor, owners: torch.Tensor) -> list[torch.Tensor]:
        """Return each unit's gradient from what the hooks left."""
        losses.sum().backward()
        rows = [self._taken(name, parameter, len(losses)) for name, parameter in self._trained.items()]
        return sum_by_unit(rows, owners)

    @staticmethod
    def _taken(name: str, parameter: nn.Parameter, examples: int) -> torch.Tensor:
        gradient = getattr(parameter, "grad_sample", None)
        parameter.grad = None
        if not isinstance(gradient, torch.Tensor) or gradient.shape[0] != examples:
            raise PrivacyError(f"{name} left no gradient per example ({examples} examples); {ONE_BY_ONE}")
        parameter.grad_sample = None  # type: ignore[attr-defined]
        return gradient


def layers_without_opacus_rule(network: nn.Module) -> list[str]:
    """Return `name (type)` of every module that holds a trained parameter and has no Opacus rule of its own.

    Opacus would try such a module with functorch; whether that is right depends on the module, so it is refused.
    """
    rules = GradSampleModule.GRAD_SAMPLERS
    return [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if any(each.requires_grad for each in module.parameters(recurse=False)) and type(module) not in rules
    ]
