"""What keeps a trial of a network on made-up examples from leaving a trace, and from dropping anything."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from finetuning.adapters import AdaptedModel
from finetuning.batches import Example
from finetuning.made_up import made_up_examples

__all__ = ["dropout_rates", "examples_for", "traceless"]

_SPREAD = 0.1
"""Standard deviation of the made-up adapter that a trial puts in place of the received one, whoever sent that: values
that overflow would hide every fault, as a factor B of zeros would."""


def examples_for(
    adapted: AdaptedModel, classes: int | None, lengths: Sequence[int], seed: int = 0, *, summaries: bool = False
) -> tuple[Example, ...]:
    """Return made-up examples of these lengths, cut to the model's context, for a network and its task.

    `classes` is a classifier's; None for a language model. With `summaries` each has one, as long as the network's.
    """
    base = adapted.base
    examples = made_up_examples(
        base.tokenizer, base.vocabulary, lengths, classes=classes, context=base.context, seed=seed
    )
    if not summaries:
        return examples
    drawn = np.random.default_rng(seed).standard_normal((len(examples), base.network.config.hidden_size))
    return tuple(replace(example, summary=row) for example, row in zip(examples, drawn.astype(np.float32), strict=True))


@contextmanager
def dropout_rates(network: nn.Module, rate: float) -> Generator[None]:
    """Inside, whatever a module calls some dropout rate is `rate` where it was above zero.

    Masks of a batch are not those of its examples: at zero nothing is dropped. Nor is anything at 1e-30, where the code
    for dropout runs all the same.
    """
    rates = [
        (module, name, value)
        for module in network.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and value > 0
        and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__))
    ]
    for module, name, _ in rates:
        setattr(module, name, rate)
    try:
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)


@contextmanager
def traceless(adapted: AdaptedModel) -> Generator[Callable[[], list[str]]]:
    """Exchange the adapter for a made-up one, and put all back; yields what names the buffers that changed."""
    network, device = adapted.network, adapted.base.device
    values = [each.detach().clone() for each in adapted.parameters.values()]
    gradients = [(each, each.grad) for each in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    buffers = [
        (f"{prefix}.{name}", module, name, buffer, buffer.clone())
        for prefix, module in network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for parameter, _ in gradients:
        parameter.grad = None

    def changed() -> list[str]:
        held = {module: dict(module.named_buffers(recurse=False)) for _, module, _, _, _ in buffers}
        return [path for path, module, name, _, kept in buffers if not _equal(held[module].get(name), kept)]

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            with torch.no_grad():
                for name, parameter in adapted.parameters.items():
                    made_up = _SPREAD * torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.copy_(adapted.magnitudes[name] + made_up if name in adapted.magnitudes else made_up)
            yield changed
        finally:
            with torch.no_grad():
                for parameter, value in zip(adapted.parameters.values(), values, strict=True):
                    parameter.copy_(value)
                for _, module, name, buffer, kept in buffers:
                    if getattr(module, name, None) is not buffer:
                        setattr(module, name, buffer)
                    if not _equal(buffer, kept):
                        buffer.copy_(kept)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode


def _equal(left: torch.Tensor | None, right: torch.Tensor) -> bool:
    return left is not None and left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())
