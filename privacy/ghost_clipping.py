"""Ghost clipping by Opacus' hooks (Li et al. 2022, arXiv 2110.05679, section 4): to measure against, not to train with.

A first backward pass gives norms alone, a second one the gradient of Σᵢ min(1, C/‖gᵢ‖) · lossᵢ. On a 16-bit base the
second pass rounds otherwise than the first, so a clipped gradient can be longer than C (measured: by 1.5 %): no
configuration reaches this module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import nn

from privacy.clipping import ClippedSum
from privacy.example_level import NoisySum
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream

__all__ = ["GhostGradients"]


class GhostGradients(NoisySum):
    """All examples of a micro-batch in two backward passes, without any example's own gradient."""

    def __init__(
        self,
        plan: PrivacyPlan,
        network: nn.Module,
        trained: Mapping[str, nn.Parameter],
        stream: SecureStream,
    ) -> None:
        super().__init__(plan, trained, stream)
        self._hooks = GradSampleHooksFastGradientClipping(network, batch_first=True, loss_reduction="sum", strict=True)

    def close(self) -> None:
        """Remove the hooks."""
        super().close()
        self._hooks.cleanup()
        for parameter in self._trained.values():
            vars(parameter).pop("_norm_sample", None)

    def _clipped(self, losses: torch.Tensor, owners: torch.Tensor) -> ClippedSum:
        if not torch.equal(owners, torch.arange(len(losses), device=owners.device)):
            raise ValueError("ghost clipping knows one example per unit, and no padding rows")
        losses.sum().backward(retain_graph=True)
        norms = self._hooks.get_norm_sample()
        finite = torch.isfinite(norms)
        factors = torch.where(finite, (self._plan.clip_norm / norms.clamp(min=1e-30)).clamp(max=1.0), 0.0)
        self._forget()
        self._hooks.disable_hooks()
        (losses * factors).sum().backward()
        self._hooks.enable_hooks()  # for the next forward pass
        sums = tuple(torch.zeros_like(p) if p.grad is None else p.grad.float() for p in self._trained.values())
        self._forget()
        clipped = (norms > self._plan.clip_norm) & finite
        return ClippedSum(sums, clipped=int(clipped.sum()), non_finite=int((~finite).sum()))

    def _forget(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None
