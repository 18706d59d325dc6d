"""FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): each site minimizes Fₖ(w) + μ/2 ‖w - x‖².

The term's gradient μ (w - x) follows from parameters that are already noised and from what was received, so it costs
no privacy. It is not clipped: its size is the server's choice of μ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from protocol.tensors import NamedTensors
from strategies.base import ClientHalf, LocalOutcome, LocalRound, LocalStart

__all__ = ["ProximalClient", "pull_back"]


@dataclass(frozen=True)
class ProximalClient:
    """Another client half, pulled back to where its round started."""

    inner: ClientHalf
    mu: float

    def begin(self, start: LocalStart) -> LocalRound:
        """Return the inner round with the pull."""
        return _ProximalRound(self.inner.begin(start), self.mu)

    def verify_extras(self, extras: NamedTensors, adapter: NamedTensors) -> None:
        """Leave it to the inner half."""
        self.inner.verify_extras(extras, adapter)


@dataclass(frozen=True)
class _ProximalRound:
    inner: LocalRound
    mu: float

    @property
    def start(self) -> NamedTensors:
        """Where the inner round starts."""
        return self.inner.start

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add μ (w - x)."""
        self.inner.correct(parameters)
        pull_back(parameters, self.start, self.mu)

    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return what the inner round sends and keeps."""
        return self.inner.finish(after)


def pull_back(parameters: Mapping[str, nn.Parameter], start: NamedTensors, strength: float) -> None:
    """Add strength · (w - x) to each gradient."""
    for name, parameter in parameters.items():
        anchor = start[name].to(parameter.device, parameter.dtype)
        pull = strength * (parameter.detach() - anchor)
        parameter.grad = pull if parameter.grad is None else torch.add(parameter.grad, pull)
