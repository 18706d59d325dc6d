"""How a step's gradient is made: the interface that the training loop sees, and its builder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from privacy.example_level import NativeGradients, OneByOneGradients, OpacusGradients, layers_without_opacus_rule
from privacy.no_privacy import PlainGradients
from privacy.per_example import couples_examples, layers_without_native_rule
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling
from protocol.errors import PrivacyError

__all__ = [
    "GradientRule",
    "batched_gradients",
    "gradient_rule",
    "refuse_coupled_examples",
    "refuse_or_warn",
    "trained_without_rule",
]

_log = logging.getLogger(__name__)
_BATCHED: dict[str, type[NativeGradients] | type[OpacusGradients]] = {
    "native": NativeGradients,
    "opacus": OpacusGradients,
}
_TRIAL = PrivacyPlan("none", "none", PoissonSampling(1.0, 1), 1.0, 0.0, 1.0, 1, 1, None)
"""Draws nothing and promises nothing."""


class GradientRule(Protocol):
    """Draws a step's units, takes their losses micro-batch by micro-batch, and leaves the step's gradient.

    `max_micro_batch` bounds the units per micro-batch, or is None. `clipped` and `non_finite` count units, and are
    private to the site; `released_loss` is noised and accounted, and None where the plan releases no loss.
    """

    max_micro_batch: int | None
    clipped: int
    non_finite: int

    @property
    def released_loss(self) -> float | None:
        """The noised mean loss of the finished steps."""
        ...

    def draw(self, num_units: int) -> list[int]:
        """Return the positions of the units that this step uses."""
        ...

    def accumulate(self, losses: torch.Tensor, owners: torch.Tensor | None = None) -> None:
        """Take one micro-batch's per-example losses, shape (examples,), through the backward pass.

        `owners` (int64, same shape) gives the unit of each example, 0 to units - 1, and -1 for a padding row; None:
        each example is its own unit. All examples of a unit belong into one call.
        """
        ...

    def finish(self) -> None:
        """Write the step's gradient into `.grad` of every trained parameter, also after an empty draw."""
        ...

    def close(self) -> None:
        """Leave the network as it was found."""
        ...


def gradient_rule(
    plan: PrivacyPlan,
    per_example: str,
    network: nn.Module,
    trained: Mapping[str, nn.Parameter],
    stream: SecureStream,
    *,
    without_rule: str = "one_by_one",
) -> GradientRule:
    """Return the rule for a plan.

    Args:
        plan: what is promised.
        per_example: `native`, `opacus` or `one_by_one`; without privacy it is not used, and discrete noise is always
            `one_by_one`.
        network: the whole network, whose forwards may be exchanged, or hooks set, until `close`.
        trained: the parameters that training moves, by name.
        stream: the randomness of sampling and noise.
        without_rule: what happens where a trained layer has no per-example rule: `one_by_one` (exact, with a warning
            that names the layers) or `refuse`.

    Raises:
        PrivacyError: naming a batch norm; or, under `refuse`, the first layer that has no per-example rule.
    """
    if not plan.is_private:
        return PlainGradients(plan, trained, stream)
    refuse_coupled_examples(network)
    # A record's own gradient must not depend, not even by rounding, on what it was padded and batched with.
    if per_example != "one_by_one" and not plan.discrete:
        problem = trained_without_rule(per_example, network, trained)
        if problem is None:
            return _BATCHED[per_example](plan, network, trained, stream)
        refuse_or_warn(problem, without_rule)
    return OneByOneGradients(plan, trained, stream)


@contextmanager
def batched_gradients(
    per_example: str, network: nn.Module, trained: Mapping[str, nn.Parameter]
) -> Generator[Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]]:
    """Give what a rule clips: losses (examples,) and their units to one tensor (units, *parameter shape) a parameter.

    Nothing is clipped, noised or drawn: for a network that is tried on made-up examples.
    """
    stream = SecureStream.from_operating_system()
    rule = _BATCHED[per_example](_TRIAL, network, trained, stream)
    try:
        yield rule.per_unit
    finally:
        rule.close()


def refuse_coupled_examples(network: nn.Module) -> None:
    """Refuse a network with a layer that is known to mix the examples of a batch.

    Raises:
        PrivacyError: naming a batch norm.
    """
    coupling = couples_examples(network)
    if coupling:
        raise PrivacyError(
            f"{coupling[0]} mixes the examples of a batch, so no example's influence is bounded; use a model without "
            "batch norm (a layer norm or a group norm will do)"
        )


def trained_without_rule(per_example: str, network: nn.Module, trained: Mapping[str, nn.Parameter]) -> str | None:
    """Return a sentence that names the trained layers without a rule in `native` or `opacus`; None if all have one."""
    if per_example == "one_by_one":
        return None
    if per_example not in _BATCHED:
        raise ValueError(f"per_example={per_example!r} is none of {', '.join(_BATCHED)}, one_by_one")
    native = per_example == "native"
    missing = layers_without_native_rule(network, trained) if native else layers_without_opacus_rule(network)
    if not missing:
        return None
    named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return f"{len(missing)} trained layer(s) have no per-example gradient rule in {per_example}: {named}"


def refuse_or_warn(problem: str, without_rule: str) -> None:
    """Refuse to train one unit at a time for a problem, or warn that it will be done.

    Raises:
        PrivacyError: under `refuse`.
    """
    if without_rule == "refuse":
        raise PrivacyError(
            f"{problem}; set privacy.per_example_gradients=one_by_one (exact for every architecture, slower), or leave "
            "the layer out of peft.targets"
        )
    _log.warning("%s; every layer is trained one by one instead: exact, and slower on a GPU", problem)
