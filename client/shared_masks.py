"""Does a network drop out the same values for all examples of a batch?

Masks of dropout are secret, and independent from record to record: which mask a record meets tells nothing, whoever is
drawn beside it. A mask that all rows of a batch share (over a table of distances, or over a whole layer) ties the
gradients of those rows together, and who shares it depends on who was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from finetuning.batches import Example

__all__ = ["shared_masks"]


def shared_masks(
    network: nn.Module, losses: Callable[[Sequence[Example]], torch.Tensor], batches: Sequence[Sequence[Example]]
) -> str | None:
    """Return a sentence that names what is dropped for a whole batch, or None.

    Args:
        network: in any mode; it is left in training mode, and draws from torch's random state.
        losses: runs the network on examples.
        batches: of different size. An input whose first dimension is no multiple of each holds no row per example.
    """
    for name, module in network.named_modules():
        for attribute in ("layerdrop", "layer_drop"):
            rate = getattr(module, attribute, 0.0)
            if isinstance(rate, float) and rate > 0:
                where = name or "the network"
                return f"{where} leaves out whole layers for all examples of a batch ({attribute}={rate:g})"
    dropping = {name: module for name, module in network.named_modules() if _drops(module)}
    if not dropping:
        return None
    with torch.random.fork_rng(), torch.no_grad(), _in_training(network):
        for batch in batches:
            odd = set[str]()
            with ExitStack() as stack:
                for name, module in dropping.items():
                    handle = module.register_forward_pre_hook(_noting(name, len(batch), odd))
                    stack.callback(handle.remove)
                losses(batch)
            if odd:
                return f"{min(odd)} drops out the same values for all examples of a batch"
    return None


def _drops(module: nn.Module) -> bool:
    rate = getattr(module, "p", getattr(module, "drop_prob", 0.0))
    return "Dropout" in type(module).__name__ and isinstance(rate, float) and rate > 0


def _noting(name: str, examples: int, odd: set[str]) -> Callable[..., None]:
    def note(_: Any, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].shape[0] % examples:
            odd.add(name)

    return note


@contextmanager
def _in_training(network: nn.Module) -> Generator[None]:
    """Training mode inside, each module's own mode after it."""
    modes = [(module, module.training) for module in network.modules()]
    network.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
