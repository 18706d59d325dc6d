"""A few made-up examples go through the network before anything is reserved: does each one's gradient stand alone?

The rules of per-example gradients know layers by their class. What a model does around a layer (flatten its batch, mix
its examples) shows only in use, and the first real use comes after a round was booked. So the gradients that a way
gives for three examples of different length are compared with those of each example alone, by plain autograd.

================================================  ==========================================================
what is found                                     what follows
================================================  ==========================================================
all agree                                         the way that is asked for
the way fails, or gives other gradients           one unit at a time, exact for such a model; or a refusal
an example's gradient depends on its batch        refused; one unit at a time is exact, where it is asked for
... on which examples came before                 refused: no way bounds one record's influence
the network draws random numbers of its own       one unit at a time: nothing can be compared
================================================  ==========================================================

It sees what the made-up examples make the network do: a layer that mixes examples only for some tokens can escape it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from conf.schema.privacy import ExampleLevel, UserLevel
from conf.schema.site import SiteRuntime
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example, collate, framed
from finetuning.models import checkpointing
from finetuning.tasks.base import TaskObjective
from privacy.gradients import batched_gradients, refuse_coupled_examples, refuse_or_warn, trained_without_rule
from privacy.per_example import ONE_BY_ONE
from privacy.plan import PrivacyPlan
from protocol.errors import ModelError, PrivacyError

__all__ = ["made_up_examples", "way_of_gradients", "without_dropout"]

_LENGTHS = (9, 6, 4)
"""Tokens of the made-up examples; none is their number, so that rows of positions are no rows of examples."""
_SPREAD = 0.02
"""Added to every adapter value: a factor B of zeros would hide every fault of A."""
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDED = 0.25
"""Tolerance for 16-bit bases: padding changes how they round."""
_NEGLIGIBLE = 0.1
"""Of a tensor's even share of the gradient: below it a difference is measured against this, not against the tensor."""
_NOT_FINITE = "the gradients of made-up examples are not finite, so that no rule could be tried"


def way_of_gradients(
    privacy: PrivacyPlan,
    asked: ExampleLevel | UserLevel,
    adapted: AdaptedModel,
    trained: Mapping[str, nn.Parameter],
    objective: TaskObjective,
    runtime: SiteRuntime,
    classes: int | None = None,
) -> str:
    """Return how per-example gradients are made: as it is asked for, or `one_by_one` where that would not be exact.

    What was found is kept beside the network, so it costs a few short passes once per attached adapter. The network is
    left as it was: parameters, gradients, buffers, modes, hooks, and torch's random state.

    Args:
        privacy: what is promised.
        asked: its configuration.
        adapted: the network.
        trained: the parameters that training moves, by name.
        objective: the loss per example.
        runtime: what else the forward passes of this site are subject to.
        classes: of a classifier; None for a language model.

    Raises:
        PrivacyError: the examples of a batch, or of two batches, interact; or a fallback is needed and not wanted.
        ModelError: the network cannot even take the made-up examples.
    """
    way = "one_by_one" if privacy.discrete else asked.per_example_gradients
    refuse_coupled_examples(adapted.network)
    key = (way, frozenset(trained), type(objective), runtime.gradient_checkpointing, runtime.static_shapes)
    first_time = key not in adapted.checked
    if first_time:
        missing = trained_without_rule(way, adapted.network, trained)
        examples = made_up_examples(adapted, classes)
        trial = _DryRun(adapted, trained, objective, runtime, "one_by_one" if missing else way, examples)
        adapted.checked[key] = trial.problem() or missing
    problem = adapted.checked[key]
    if problem is None:
        return way
    if first_time or asked.without_rule == "refuse":
        refuse_or_warn(problem, asked.without_rule)
    return "one_by_one"


def made_up_examples(adapted: AdaptedModel, classes: int | None) -> tuple[Example, ...]:
    """Return examples of different length whose tokens are drawn from the vocabulary, without its special tokens."""
    base = adapted.base
    embeddings: Any = base.network.get_input_embeddings()
    special = [*base.tokenizer.all_special_ids, base.pad_token_id]
    usable = np.setdiff1d(np.arange(min(len(embeddings.weight), len(base.tokenizer))), special)
    generator = np.random.default_rng(0)
    lengths = [min(length, base.context or length) for length in _LENGTHS]
    return tuple(
        Example(
            framed(generator.choice(usable, length).astype(np.int32), base.tokenizer, classes is not None),
            np.ones(length, dtype=np.bool_),
            None if classes is None else position % classes,
        )
        for position, length in enumerate(lengths)
    )


@dataclass(frozen=True)
class _DryRun:
    """A network and made-up examples; a gradient is a list of tensors, in the order of `trained`."""

    adapted: AdaptedModel
    trained: Mapping[str, nn.Parameter]
    objective: TaskObjective
    runtime: SiteRuntime
    way: str
    examples: Sequence[Example]

    def problem(self) -> str | None:
        """Return why the way would not be exact, or None."""
        with ExitStack() as stack:
            changed_buffers = stack.enter_context(_traceless(self.adapted))
            stack.enter_context(checkpointing(self.adapted.base.network, self.runtime.gradient_checkpointing))
            stack.enter_context(without_dropout(self.adapted.network))
            self.adapted.network.train()
            first = self._first()
            usable = _finite(first)
            found = self._problem_of_way(first) if usable else _NOT_FINITE
            self._alone(1)
            again = self._differing(self._alone(0), first) if usable else []
            _refuse_memory([*changed_buffers(), *again])
        return None if self.way == "one_by_one" else found

    def _first(self) -> list[torch.Tensor]:
        try:
            return self._alone(0)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(f"the network fails on a few made-up tokens: {_first_line(error)}") from error

    def _problem_of_way(self, first: Sequence[torch.Tensor]) -> str | None:
        if self.way == "one_by_one":
            self._refuse_padding(first)
            return None
        problem = self._disagreement(first)
        if problem is None:
            return None
        if self._differing(self._alone(0, seed=1), first):
            return f"{problem}; the network draws random numbers, so it cannot be compared"
        self._refuse_interaction()
        return problem

    def _disagreement(self, first: Sequence[torch.Tensor]) -> str | None:
        try:
            rows = self._by_the_way()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code makes of an exchanged forward or a hook
            reason = _first_line(error).removesuffix(f"; {ONE_BY_ONE}")
            return f"a dry run of privacy.per_example_gradients={self.way} failed ({reason})"
        for position in range(len(self.examples)):
            alone = first if position == 0 else self._alone(position)
            wrong = self._differing([each[position] for each in rows], alone)
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                return (
                    f"a dry run of privacy.per_example_gradients={self.way} gave gradients of "
                    f"{', '.join(wrong[:3])}{more} that are not one example's own"
                )
        return None

    def _by_the_way(self) -> list[torch.Tensor]:
        """Return what the way gives for all examples in one batch, each (examples, *parameter shape)."""
        entered: list[str] = []
        with ExitStack() as stack:
            per_unit = stack.enter_context(batched_gradients(self.way, self.adapted.network, self.trained))
            stack.enter_context(_noted(self.adapted.network, self.trained, entered))
            try:
                losses = self._losses(range(len(self.examples)))
            except Exception as error:
                where = entered[-1] if entered else "the network"
                raise RuntimeError(f"in {where}: {_first_line(error)}") from error
            return per_unit(losses, torch.arange(len(losses), device=losses.device))

    def _refuse_interaction(self) -> None:
        """Plain autograd, no rule: the same example in a batch, where it is padded, and alone."""
        shortest = len(self.examples) - 1
        together = self._losses(range(len(self.examples)))[shortest]
        wrong = self._differing(self._gradient(together), self._alone(shortest))
        if wrong:
            raise PrivacyError(
                f"an example's gradient depends on what it is batched with (a dry run saw it in {wrong[0]}), so one "
                f"record's influence has no bound; use a model that treats examples apart, or {ONE_BY_ONE}"
            )

    def _refuse_padding(self, first: Sequence[torch.Tensor]) -> None:
        """Static shapes pad to the site's longest record, which is another's."""
        if not self.runtime.static_shapes:
            return
        padded = self._losses([0], rows=len(_LENGTHS), length=len(self.examples[0]) + len(_LENGTHS))[0]
        wrong = self._differing(self._gradient(padded), first)
        if wrong:
            raise PrivacyError(
                f"an example's gradient depends on its padding (a dry run saw it in {wrong[0]}), and static shapes pad "
                "it to the longest record of all; set runtime.static_shapes=false"
            )

    def _alone(self, position: int, seed: int = 0) -> list[torch.Tensor]:
        return self._gradient(self._losses([position], seed)[0])

    def _losses(
        self, positions: Sequence[int], seed: int = 0, rows: int | None = None, length: int | None = None
    ) -> torch.Tensor:
        base = self.adapted.base
        torch.manual_seed(seed)
        chosen = [self.examples[position] for position in positions]
        batch = collate(chosen, base.pad_token_id, rows=rows, length=length)
        return self.objective.losses(self.adapted.network, batch.to(base.device))

    def _gradient(self, loss: torch.Tensor) -> list[torch.Tensor]:
        parameters = list(self.trained.values())
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    def _differing(self, ours: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> list[str]:
        """Return the names of the tensors in which two gradients differ by more than rounding explains."""
        tolerance = _TOLERANCES.get(self.adapted.base.network.dtype, _ROUNDED)
        norms = [float(each.double().norm()) for each in truth]
        least = _NEGLIGIBLE * math.hypot(*norms) / math.sqrt(len(norms))
        return [
            name
            for name, own, other, norm in zip(self.trained, ours, truth, norms, strict=True)
            if not float((own.double() - other.double()).norm()) <= tolerance * max(norm, least)
        ]


@contextmanager
def without_dropout(network: nn.Module) -> Generator[None]:
    """Inside, whatever a module calls some dropout rate is zero: masks of a batch are not those of its examples."""
    rates = [
        (module, name, value)
        for module in network.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__))
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)


@contextmanager
def _traceless(adapted: AdaptedModel) -> Generator[Callable[[], list[str]]]:
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


@contextmanager
def _noted(network: nn.Module, trained: Mapping[str, nn.Parameter], entered: list[str]) -> Generator[None]:
    """Note the names of the trained layers, in the order in which they are entered."""
    wanted = {id(parameter) for parameter in trained.values()}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: entered.append(name)

    handles = [
        module.register_forward_pre_hook(note(f"{name} ({type(module).__name__})"))
        for name, module in network.named_modules()
        if any(id(parameter) in wanted for parameter in module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_memory(changed: Sequence[str]) -> None:
    if changed:
        raise PrivacyError(
            f"the network remembers the examples it saw: a dry run changed {changed[0]}, so one record's influence "
            "reaches the gradients of others and has no bound; use a model without such a state"
        )


def _equal(left: torch.Tensor | None, right: torch.Tensor) -> bool:
    return left is not None and left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())


def _finite(gradient: Sequence[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in gradient)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
