"""Takes per-example gradients during one backward pass, and refuses one that is missing or counted twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from protocol.errors import PrivacyError

__all__ = ["ONE_BY_ONE", "Deposit", "Forward", "Recorder", "once"]

ONE_BY_ONE = "set privacy.per_example_gradients=one_by_one (exact for every architecture, slower)"
"""The way out that every refusal names."""

Forward = Callable[..., torch.Tensor]
"""What stands in for a module's own `forward`."""

Deposit = Callable[[torch.Tensor], None]
"""Takes one use's per-example gradients of one parameter, shape (examples, *parameter shape)."""


class Recorder:
    """Holds the per-example gradients of the trained parameters while one backward pass deposits them."""

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._trained = trained
        self._rows: dict[str, torch.Tensor] = {}
        self._examples: int | None = None

    def trains(self, parameter: nn.Parameter | None) -> bool:
        """Whether the gradient of this parameter is wanted."""
        return id(parameter) in self._names

    def deposit_for(self, parameter: nn.Parameter) -> Deposit:
        """Return what a layer's backward hands its per-example gradients to."""
        name = self._names[id(parameter)]
        return lambda rows: self._deposit(name, rows)

    def copies(self, parameter: nn.Parameter, like: torch.Tensor) -> torch.Tensor:
        """Return each example's own view of a vector that scales or shifts `like`, shape (examples, 1, ..., n).

        The view shares one storage. Autograd hands back the gradient of each example's view: its per-example gradient,
        whatever is computed from it. A parameter that does not train is returned as it is.
        """
        if not self.trains(parameter):
            return parameter
        own: torch.Tensor = _Copies.apply(parameter, len(like), self.deposit_for(parameter))  # type: ignore[assignment]
        return own.reshape(len(like), *[1] * (like.dim() - 2), -1)

    def backward(self, losses: torch.Tensor) -> list[torch.Tensor]:
        """Run the backward pass of per-example losses, shape (examples,), and return each parameter's gradients.

        Returns:
            One tensor (examples, *parameter shape) per trained parameter, in their order.

        Raises:
            PrivacyError: naming the parameter that deposited nothing, for other than these examples, or beside its
                rule; or a second backward pass over the same graph.
        """
        self._examples = len(losses)
        for parameter in self._trained.values():
            parameter.grad = None
        try:
            losses.sum().backward()
            return [self._taken(name, parameter) for name, parameter in self._trained.items()]
        finally:
            self._examples = None
            self._rows = {}

    def _deposit(self, name: str, rows: torch.Tensor) -> None:
        if self._examples is None:
            raise PrivacyError(
                f"{name} met a backward pass that is not the gradient rule's own: its examples would count twice; "
                "hand the losses to accumulate() once, and call backward() nowhere else"
            )
        if len(rows) != self._examples:
            raise PrivacyError(
                f"{name} belongs to a layer whose input has {len(rows)} rows for {self._examples} examples, so no row "
                f"is one example's own; {ONE_BY_ONE}"
            )
        before = self._rows.get(name)
        # A tied or reused parameter: one example's gradient is the sum over its uses, in float32 whatever the model's.
        self._rows[name] = rows if before is None else before.float() + rows.float()

    def _taken(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        beside, parameter.grad = parameter.grad, None
        rows = self._rows.get(name)
        if beside is not None:
            raise PrivacyError(f"{name} took part of its gradient outside of its layer's forward; {ONE_BY_ONE}")
        if rows is None:
            raise PrivacyError(f"{name} left no gradient per example ({self._examples} examples); {ONE_BY_ONE}")
        return rows


def once(ctx: Any) -> None:
    """Refuse the second backward pass of one forward.

    Raises:
        PrivacyError: always the second time.
    """
    if getattr(ctx, "spent", False):
        raise PrivacyError(
            "a second backward pass through the same graph would count every example twice; compute the losses again"
        )
    ctx.spent = True


class _Copies(torch.autograd.Function):
    """One view of a parameter per example; the gradient of the views is deposited."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, examples: int, deposit: Deposit) -> torch.Tensor:
        ctx.deposit = deposit
        return parameter.detach().expand(examples, *parameter.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[None, None, None]:
        once(ctx)
        ctx.deposit(outputs[0])
        return None, None, None
