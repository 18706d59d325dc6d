"""One round's updates together: stacked, mixed, and with the inner products that a rule asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from protocol.tensors import NamedTensors, digest
from strategies.robust.geometry import gram

__all__ = ["Updates", "distances", "stack"]


@dataclass(frozen=True)
class Updates:
    """K updates of the same layout, and one more to compare with where a rule has one (`reference`).

    Mixing replaces update k by Σⱼ mixing[k, j] xⱼ, with rows that sum to one.
    """

    given: tuple[NamedTensors, ...]
    starts: tuple[NamedTensors, ...]
    products: bool
    mixing: torch.Tensor
    """(K, number given), float64."""
    reference: NamedTensors | None = None

    def __len__(self) -> int:
        return self.mixing.shape[0]

    @cached_property
    def gram(self) -> torch.Tensor:
        """Inner products of the K mixed updates, and last of the reference where there is one; float64."""
        mixing = self.mixing
        if self.reference is not None:
            mixing = torch.block_diag(mixing, torch.ones(1, 1, dtype=torch.float64))
        return mixing @ self.given_gram @ mixing.T

    @cached_property
    def given_gram(self) -> torch.Tensor:
        """The same before mixing."""
        given, starts = list(self.given), list(self.starts)
        if self.reference is not None:
            given.append(self.reference)
            starts.append(starts[0])
        return gram(given, starts, products=self.products)

    def combination(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return Σ wₖ xₖ as float32; K weights, and one for the reference where there is one."""
        own = weights[: len(self)].double() @ self.mixing
        result: dict[str, torch.Tensor] = {}
        for name in sorted(self.given[0]):
            total = torch.zeros(self.given[0][name].shape, dtype=torch.float64)
            for weight, update in zip(own.tolist(), self.given, strict=True):
                total.add_(update[name], alpha=weight)
            if self.reference is not None:
                total.add_(self.reference[name], alpha=float(weights[-1]))
            result[name] = total.float()
        return result

    def stacked(self, name: str) -> torch.Tensor:
        """Return one tensor of the K mixed updates, (K, *shape), float64."""
        tensors = torch.stack([update[name] for update in self.given]).double()
        return torch.tensordot(self.mixing, tensors, dims=1)


def stack(
    updates: Sequence[NamedTensors],
    starts: Sequence[NamedTensors],
    *,
    products: bool,
    reference: NamedTensors | None = None,
) -> Updates:
    """Return unmixed updates in an order of their own, so that the order of arrival does not show.

    Raises:
        ValueError: none, or layouts that differ.
    """
    if not updates:
        raise ValueError("there is no mean of no updates")
    layouts: set[tuple[tuple[str, tuple[int, ...]], ...]] = {_layout(update) for update in updates}
    if len(layouts) > 1:
        raise ValueError("robust rules need updates of one layout, got several; use one LoRA rank for all sites")
    order = sorted(range(len(updates)), key=lambda index: digest(updates[index]))
    identity = torch.eye(len(updates), dtype=torch.float64)
    given, begun = tuple(updates[index] for index in order), tuple(starts[index] for index in order)
    return Updates(given, begun, products, identity, reference)


def distances(inner: torch.Tensor) -> torch.Tensor:
    """Return squared distances from inner products, never below zero."""
    norms = inner.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * inner).clamp_min(0).fill_diagonal_(0)


def _layout(update: Mapping[str, torch.Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(update[name].shape)) for name in sorted(update))
