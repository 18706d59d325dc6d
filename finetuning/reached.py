"""Which modules of a network a task runs, and which of them its loss depends on.

A network may hold more than its task uses: towers for pictures and sound, layers that share another's keys, a head for
some other output. An adapter there has no gradient, so that under privacy it becomes pure noise. Nothing in a network's
names or configuration tells reliably, so a few made-up tokens are sent through it. On the output of every linear layer
and embedding lies a change of rank one, as LoRA would make it,

    y' = y + b (a · x)        (an embedding of token i: y' = y + b aᵢ)

with random a and b; a layer is reached where the loss has a gradient with respect to b. It has none where the layer is
not called, where its result is dropped, detached or masked, and where another module reads its weight without calling
it, past any adapter.

Experts that a router did not choose for these tokens are no such layers: other tokens may choose them. The members of a
list count as chosen by tokens when other tokens reach other members; then all are reached that are like one that is.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetuning.batches import Batch
from finetuning.tasks.base import TaskObjective
from protocol.errors import ModelError

__all__ = ["reached_modules"]

_SIZE = 0.02
"""Standard deviation of b: small beside activations, and far above the rounding of 16 bits."""
_LAYERS = (nn.Linear, Conv1D, nn.Embedding)


def reached_modules(
    network: nn.Module,
    objective: TaskObjective,
    batch: Batch,
    others: Sequence[Batch] = (),
    besides: Collection[str] = (),
) -> frozenset[str]:
    """Return the names of the linear layers and embeddings that the loss reaches, and of the modules named `besides`.

    The network is left as it was. Torch's random state is not moved.

    Args:
        network: the base, with nothing attached.
        objective: the loss.
        batch: made-up examples.
        others: more of them, other and fewer tokens each; needed only where members of a list are not reached.
        besides: modules of any other kind, such as a norm: there the gradient of their own weights tells.

    Raises:
        ModelError: the network fails on the examples.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    reached = _reached(network, objective, batch, besides)
    idle = _idle_members(modules, reached)
    if not idle:
        return reached
    seen = [reached, *(_reached(network, objective, each, besides) for each in others)]
    every = frozenset[str]().union(*seen)
    for members in _lists(modules):
        alive = [frozenset(member for member in members if _within(member, found)) for found in seen]
        if len({each for each in alive if each}) > 1:
            every |= _alike(members, modules, every)
    return every


def _reached(network: nn.Module, objective: TaskObjective, batch: Batch, besides: Collection[str]) -> frozenset[str]:
    """Return what one batch reaches."""
    device = next(network.parameters()).device
    modes = [(module, module.training) for module in network.modules()]
    own = {
        f"{name}|{key}": parameter
        for name in besides
        for key, parameter in network.get_submodule(name).named_parameters(recurse=False)
        if not isinstance(network.get_submodule(name), _LAYERS)
    }
    asked = [(each, each.requires_grad) for each in network.parameters()]
    network.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _changes(network) as changes:
            for parameter in own.values():
                parameter.requires_grad_(True)
            loss = objective.losses(network, batch.to(device)).sum()
            leaves = {**changes, **own}
            gradients: tuple[Any, ...] = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the network fails on a few made-up tokens: {reason}") from error
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
    return frozenset(
        name.partition("|")[0]
        for name, gradient in zip(leaves, gradients, strict=True)
        if gradient is not None and bool((gradient != 0).any())
    )


@contextmanager
def _changes(network: nn.Module) -> Generator[Mapping[str, torch.Tensor]]:
    """Put a change of rank one onto every layer; yields the vectors b by the layer's name."""
    generator = torch.Generator().manual_seed(0)
    vectors: dict[str, torch.Tensor] = {}
    handles: list[Any] = []
    try:
        for name, module in network.named_modules():
            if isinstance(module, _LAYERS):
                inputs, outputs = _sizes(module)
                a = torch.randn(inputs, generator=generator) / (1 if isinstance(module, nn.Embedding) else inputs**0.5)
                b = torch.randn(outputs, generator=generator) * _SIZE
                device = module.weight.device
                vectors[name] = b.to(device).requires_grad_(True)
                handles.append(module.register_forward_hook(_changed(a.to(device), vectors[name])))
        yield vectors
    finally:
        for handle in handles:
            handle.remove()


def _sizes(module: Any) -> tuple[int, int]:
    """Return the sizes of what goes in and comes out; tokens for an embedding."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _changed(a: torch.Tensor, b: torch.Tensor) -> Any:
    def change(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(output, torch.Tensor) or not isinstance(args[0], torch.Tensor):
            return output
        given = args[0]
        if not isinstance(module, nn.Embedding):
            strength = (given.to(a.dtype) * a).sum(dim=-1)
        elif given.is_floating_point() or given.shape != output.shape[:-1]:
            return output + b.to(output.dtype)  # a table of positions that is given whatever has them
        else:
            strength = a[given]
        return output + (strength.unsqueeze(-1) * b).to(output.dtype)

    return change


def _lists(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the names of the members of each list of modules."""
    return [
        [f"{name}.{key}" for key, _ in module.named_children()]
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]


def _within(member: str, found: frozenset[str]) -> bool:
    return any(name == member or name.startswith(f"{member}.") for name in found)


def _idle_members(modules: Mapping[str, nn.Module], reached: frozenset[str]) -> bool:
    """Whether a list has members that are reached, and others with weights that are not."""
    for members in _lists(modules):
        alive = [
            _within(member, reached)
            for member in members
            if any(isinstance(each, _LAYERS) for each in modules[member].modules())
        ]
        if any(alive) and not all(alive):
            return True
    return False


def _alike(members: Sequence[str], modules: Mapping[str, nn.Module], reached: frozenset[str]) -> frozenset[str]:
    """Return what corresponds, in any member, to a module that is reached in some member."""
    inside = {name.removeprefix(member) for member in members for name in reached if _within(member, frozenset({name}))}
    return frozenset(f"{member}{rest}" for member in members for rest in inside if f"{member}{rest}" in modules)
