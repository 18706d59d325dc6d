"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): per-example gradients, clipped, summed, noised.

Opacus computes the per-example gradients by its hooks; its `PrivacyEngine.make_private` is not used, because it derives
rate, steps and normalizer from the private number of records, crashes or releases a fake gradient on an empty batch,
lets one infinite gradient poison the sum, and draws noise from torch's global generator (docs/decisions/0003).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import nn

from privacy.clipping import clipped_sum
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

__all__ = ["OneByOneGradients", "OpacusGradients", "layers_without_rule"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ONE_BY_ONE = "set privacy.per_example_gradients=one_by_one (exact for every architecture, slower)"


class _NoisySum:
    """What both ways of getting per-example gradients share: the running clipped sum, and the noised result."""

    max_micro_batch: int | None = None

    def __init__(self, plan: PrivacyPlan, trained: Mapping[str, nn.Parameter], stream: SecureStream) -> None:
        self._plan = plan
        self._trained = trained
        self._stream = stream
        self._sums = self._zeros()
        self.clipped = 0
        self.non_finite = 0

    def draw(self, num_records: int) -> list[int]:
        """Return the positions of the records that this step uses: a Poisson sample at the plan's rate."""
        return self._plan.sampling.draw(num_records, self._stream)

    def finish(self) -> None:
        """Write (clipped sum + noise) / normalizer into `.grad`; an empty draw still takes its noise."""
        for parameter, noised in zip(
            self._trained.values(), self._plan.noise.add(self._sums, self._stream), strict=True
        ):
            parameter.grad = (noised / self._plan.normalizer).to(parameter.dtype)
        self._sums = self._zeros()

    def close(self) -> None:
        """Nothing was attached to the network."""

    def _zeros(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(parameter, dtype=torch.float32) for parameter in self._trained.values())

    def _add(self, per_example: Sequence[torch.Tensor]) -> None:
        result = clipped_sum(per_example, self._plan.clip_norm)
        self._sums = tuple(total + part for total, part in zip(self._sums, result.sums, strict=True))
        self.clipped += result.clipped
        self.non_finite += result.non_finite


class OneByOneGradients(_NoisySum):
    """One example per backward pass: exact whatever the layers are."""

    max_micro_batch: int | None = 1

    def accumulate(self, losses: torch.Tensor) -> None:
        """Take the loss of one example, shape (1,)."""
        if losses.shape != (1,):
            raise ValueError(f"one example at a time, not losses of shape {tuple(losses.shape)}")
        losses.sum().backward()
        self._add([self._taken(parameter) for parameter in self._trained.values()])

    @staticmethod
    def _taken(parameter: nn.Parameter) -> torch.Tensor:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
        return gradient[None]


class OpacusGradients(_NoisySum):
    """All examples of a micro-batch in one backward pass, through Opacus' hooks."""

    def __init__(
        self,
        plan: PrivacyPlan,
        network: nn.Module,
        trained: Mapping[str, nn.Parameter],
        stream: SecureStream,
    ) -> None:
        super().__init__(plan, trained, stream)
        refused = layers_without_rule(network)
        if refused:
            raise PrivacyError(
                f"{len(refused)} trained layer(s) have no per-example gradient rule, first {refused[0]}; {ONE_BY_ONE}, "
                "or leave the layer out of peft.targets"
            )
        # The losses are summed, so each hook sees the gradient of the example's own loss.
        self._hooks = GradSampleHooks(network, batch_first=True, loss_reduction="sum", strict=True)

    def accumulate(self, losses: torch.Tensor) -> None:
        """Take the micro-batch's per-example losses, shape (examples,)."""
        losses.sum().backward()
        self._add([self._taken(name, parameter, len(losses)) for name, parameter in self._trained.items()])

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.cleanup()

    @staticmethod
    def _taken(name: str, parameter: nn.Parameter, examples: int) -> torch.Tensor:
        gradient = getattr(parameter, "grad_sample", None)
        parameter.grad = None
        if not isinstance(gradient, torch.Tensor) or gradient.shape[0] != examples:
            raise PrivacyError(f"{name} left no gradient per example ({examples} examples); {ONE_BY_ONE}")
        parameter.grad_sample = None  # type: ignore[attr-defined]
        return gradient


def layers_without_rule(network: nn.Module) -> list[str]:
    """Return `name (type)` of every module that holds a trained parameter and has no Opacus rule of its own.

    Opacus would try such a module with functorch; whether that is right depends on the module, so it is refused. A
    batch norm anywhere couples examples, so it is refused even when frozen.
    """
    return [f"{name} ({type(module).__name__})" for name, module in _owners(network)]


def _owners(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    rules = GradSampleModule.GRAD_SAMPLERS
    for name, module in network.named_modules():
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        couples = isinstance(module, _BATCH_NORMS)
        if couples or (trains and type(module) not in rules):
            yield name, module
