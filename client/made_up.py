"""Trying a network on made-up examples: the examples, and what keeps a trial from leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from finetuning.adapters import AdaptedModel
from finetuning.batches import Example

__all__ = ["dropout_rates", "made_up_examples", "traceless"]

_SPREAD = 0.02
"""Added to every adapter value: a factor B of zeros would hide every fault of A."""


def made_up_examples(
    adapted: AdaptedModel, classes: int | None, lengths: Sequence[int], seed: int = 0
) -> tuple[Example, ...]:
    """Return examples of these lengths whose tokens are drawn from the vocabulary, without its special tokens.

    A length above the model's context is cut to it. `classes` is a classifier's; None for a language model.
    """
    base = adapted.base
    embeddings: Any = base.network.get_input_embeddings()
    special = [*base.tokenizer.all_special_ids, base.pad_token_id]
    usable = np.setdiff1d(np.arange(min(len(embeddings.weight), len(base.tokenizer))), special)
    generator = np.random.default_rng(seed)
    cut = [min(length, base.context or length) for length in lengths]
    return tuple(
        Example(
            generator.choice(usable, length).astype(np.int32),
            np.ones(length, dtype=np.bool_),
            None if classes is None else position % classes,
        )
        for position, length in enumerate(cut)
    )


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
    """Spread the adapter's values, and put everything back; yields a function that names the buffers that changed."""
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
                for parameter in adapted.parameters.values():
                    parameter += _SPREAD * torch.randn(parameter.shape, generator=generator).to(parameter)
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
