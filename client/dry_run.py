"""Made-up examples go through the network before anything is reserved: does each one's gradient stand alone?

The rules of per-example gradients know layers by their class. What a model does around a layer (flatten its batch, mix
its examples, change with the length) shows only in use, and the first real use comes after a round was booked. So the
gradients that a way gives in the batches of a run, of different sizes and of lengths up to the longest that records can
have, are compared with those of each example alone, unpadded, by plain autograd.

================================================  ==========================================================
what is found                                     what follows
================================================  ==========================================================
all agree                                         the way that is asked for
the way fails, or gives other gradients           one unit at a time, exact for such a model; or a refusal
rows are picked by what they hold                 the same: which rows meet depends on the records
an example's gradient depends on its batch        refused; one unit at a time is exact, where it is asked for
... on which examples came before                 refused: no way bounds one record's influence
the network draws random numbers of its own       one unit at a time: nothing can be compared
================================================  ==========================================================

It sees what the made-up examples make the network do: a layer that mixes examples only for some tokens can escape it.
What it finds follows from public facts alone, never from a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from client.shared_masks import shared_masks
from client.trials import dropout_rates, examples_for, traceless
from conf.schema.privacy import ExampleLevel, UserLevel
from conf.schema.site import SiteRuntime
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example, collate
from finetuning.models import checkpointing
from finetuning.padding import LONGEST_TRIED, padded_length
from finetuning.tasks.base import TaskObjective
from privacy.gradients import batched_gradients, refuse_coupled_examples, refuse_or_warn, trained_without_rule
from privacy.per_example import ONE_BY_ONE
from privacy.plan import PrivacyPlan
from protocol.errors import ModelError, PrivacyError

__all__ = ["probed_lengths", "way_of_gradients"]

_BATCHES = ((9, 6, 4), (18, 31, 23, 27, 20))
"""Tokens of the examples that meet in a batch; no batch has as many examples as its rows have positions, so that rows
of positions are no rows of examples."""
_FIRST_ALONE = 33
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDED = 0.25
"""Tolerance for 16-bit bases: padding changes how they round."""
_NEGLIGIBLE = 0.1
"""Of a tensor's even share of the gradient: below it a difference is measured against this, not against the tensor."""
_REMEMBERED = 1e-6
"""Relative difference of two losses of the same example that is no rounding."""
_NOT_FINITE = "the gradients of made-up examples are zero or not finite, so that no rule could be tried"
_PICKING = (
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "repeat_interleave",
    "bincount",
    "histc",
    "sort",
    "_grouped_mm",
)
"""Operators whose rows depend on the values: a routed expert multiplies the tokens that chose it, whosever they are."""


def way_of_gradients(
    privacy: PrivacyPlan,
    asked: ExampleLevel | UserLevel,
    adapted: AdaptedModel,
    trained: Mapping[str, nn.Parameter],
    objective: TaskObjective,
    runtime: SiteRuntime,
    classes: int | None = None,
    longest: int | None = None,
) -> str:
    """Return how per-example gradients are made: as it is asked for, or `one_by_one` where that would not be exact.

    What was found is kept beside the network, so it costs some short passes once per attached adapter. The network is
    left as it was: parameters, gradients, buffers, modes, hooks, and torch's random state.

    Args:
        privacy: what is promised.
        asked: its configuration.
        adapted: the network.
        trained: the parameters that training moves, by name.
        objective: the loss per example.
        runtime: what else the forward passes of this site are subject to.
        classes: of a classifier; None for a language model.
        longest: public bound on a record's tokens; None: the model's context.

    Raises:
        PrivacyError: the examples of a batch, or of two batches, interact; or a fallback is needed and not wanted.
        ModelError: the network cannot even take the made-up examples.
    """
    way = "one_by_one" if privacy.discrete else asked.per_example_gradients
    refuse_coupled_examples(adapted.network)
    longest = longest or min(adapted.base.context or LONGEST_TRIED, LONGEST_TRIED)
    how = (runtime.gradient_checkpointing, runtime.static_shapes)
    key = (way, frozenset(trained), type(objective), classes, longest, *how)
    first_time = key not in adapted.checked
    if first_time:
        missing = trained_without_rule(way, adapted.network, trained)
        lengths = probed_lengths(longest)
        trial = _DryRun(
            adapted,
            trained,
            objective,
            runtime,
            "one_by_one" if missing else way,
            tuple(examples_for(adapted, classes, batch) for batch in lengths),
            longest,
        )
        adapted.checked[key] = trial.problem() or missing
    problem = adapted.checked[key]
    if problem is None:
        return way
    if first_time or asked.without_rule == "refuse":
        refuse_or_warn(problem, asked.without_rule)
    return "one_by_one"


def probed_lengths(longest: int) -> tuple[tuple[int, ...], ...]:
    """Return the lengths of the made-up examples, batch by batch: two batches of short ones, then single ones.

    Those follow powers of two, one token above each, where padding is largest; the last is the longest that a record
    can have, whatever a micro-batch holds: a longer record is computed all the same, alone.

    >>> probed_lengths(100)
    ((9, 6, 4), (18, 31, 23, 27, 20), (33,), (65,), (100,))
    >>> probed_lengths(24)
    ((9, 6, 4), (18, 24, 23, 24, 20))
    """
    batches = [tuple(min(length, longest) for length in batch) for batch in _BATCHES]
    powers = range((_FIRST_ALONE - 1).bit_length() - 1, longest.bit_length())
    alone = sorted(
        {length for length in (*((1 << power) + 1 for power in powers), longest) if _FIRST_ALONE <= length <= longest}
    )
    return (*batches, *((length,) for length in alone))


@dataclass(frozen=True)
class _DryRun:
    """A network and made-up examples; a gradient is a list of tensors, in the order of `trained`."""

    adapted: AdaptedModel
    trained: Mapping[str, nn.Parameter]
    objective: TaskObjective
    runtime: SiteRuntime
    way: str
    batches: Sequence[Sequence[Example]]
    longest: int

    def problem(self) -> str | None:
        """Return why the way would not be exact, or None."""
        first, second = self.batches[0][:2]
        with ExitStack() as stack:
            changed_buffers = stack.enter_context(traceless(self.adapted))
            stack.enter_context(checkpointing(self.adapted.base.network, self.runtime.gradient_checkpointing))
            stack.enter_context(dropout_rates(self.adapted.network, 0.0))
            self.adapted.network.train()
            truth, picking = self._tried(first)
            usable = _finite(truth) and any(bool(each.any()) for each in truth)
            found = self._problem_of_way(first, truth, picking) if usable else _NOT_FINITE
            changed = self._remembered_lengths()
            self._alone(second)
            again = self._differing(self._alone(first), truth) if usable else []
            _refuse_memory([*changed_buffers(), *again, *changed])
        if self.way == "one_by_one":
            return None
        return found or shared_masks(self.adapted.network, self._losses, self.batches[:2])

    def _tried(self, example: Example) -> tuple[list[torch.Tensor], str | None]:
        """Return the gradient of the first example, and the operator that picks rows by their values, if one does."""
        try:
            with _Picking() as picking, torch.no_grad():
                self._losses(self.batches[0], length=self._padded(self.batches[0]))  # several rows, and padding
            return self._alone(example), picking.found
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(f"the network fails on a few made-up tokens: {_first_line(error)}") from error

    def _problem_of_way(self, first: Example, truth: Sequence[torch.Tensor], picking: str | None) -> str | None:
        problem = None if self.way == "one_by_one" else self._disagreement()
        if problem is not None:
            if self._differing(self._alone(first, seed=1), truth):
                return f"{problem}; the network draws random numbers, so it cannot be compared"
            self._refuse_interaction()
        if self.runtime.static_shapes and (problem or picking or self.way == "one_by_one"):
            self._refuse_padding(first, truth)
        if picking is not None and problem is None:
            return f"the network picks rows by what they hold ({picking}), so which ones are computed together varies"
        return problem

    def _disagreement(self) -> str | None:
        for batch in self.batches:
            weights = torch.arange(1.0, len(batch) + 1)  # Losses that weigh alike would hide rows that are mixed up.
            try:
                rows = self._by_the_way(batch, weights)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model's own code makes of an exchanged forward or a hook
                reason = _first_line(error).removesuffix(f"; {ONE_BY_ONE}")
                return f"a dry run of privacy.per_example_gradients={self.way} failed ({reason})"
            for position, example in enumerate(batch):
                alone = [float(weights[position]) * each for each in self._alone(example)]
                wrong = self._differing([each[position] for each in rows], alone)
                if wrong:
                    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                    return (
                        f"a dry run of privacy.per_example_gradients={self.way} gave gradients of "
                        f"{', '.join(wrong[:3])}{more} that are not one example's own"
                    )
        return None

    def _by_the_way(self, batch: Sequence[Example], weights: torch.Tensor) -> list[torch.Tensor]:
        """Return what the way gives for the examples in one batch, each (examples, *parameter shape)."""
        entered: list[str] = []
        with ExitStack() as stack:
            per_unit = stack.enter_context(batched_gradients(self.way, self.adapted.network, self.trained))
            stack.enter_context(_noted(self.adapted.network, self.trained, entered))
            try:
                losses = self._losses(batch, length=self._padded(batch))
            except Exception as error:
                where = entered[-1] if entered else "the network"
                raise RuntimeError(f"in {where}: {_first_line(error)}") from error
            return per_unit(losses * weights.to(losses), torch.arange(len(losses), device=losses.device))

    def _padded(self, batch: Sequence[Example]) -> int:
        """Return how far a run pads these examples."""
        longest = max(len(example) for example in batch)
        if self.runtime.static_shapes:
            return padded_length(max(longest, self.longest), self.longest)
        return padded_length(longest, self.longest)

    def _refuse_interaction(self) -> None:
        """Plain autograd, no rule: the same example beside others, and alone, padded as far."""
        for batch in self.batches[:2]:
            shortest = min(range(len(batch)), key=lambda position: len(batch[position]))
            length = self._padded(batch)
            together = self._losses(batch, length=length)[shortest]
            alone = self._losses([batch[shortest]], length=length)[0]
            wrong = self._differing(self._gradient(together), self._gradient(alone))
            if wrong:
                raise PrivacyError(
                    f"an example's gradient depends on what it is batched with (a dry run saw it in {wrong[0]}), so "
                    f"one record's influence has no bound; use a model that treats examples apart, or {ONE_BY_ONE}"
                )

    def _refuse_padding(self, first: Example, truth: Sequence[torch.Tensor]) -> None:
        """Static shapes pad to the longest that a record can be."""
        padded = self._losses([first], rows=3, length=max(self._padded([first]), len(first) + 3))[0]
        wrong = self._differing(self._gradient(padded), truth)
        if wrong:
            raise PrivacyError(
                f"an example's gradient depends on its padding (a dry run saw it in {wrong[0]}), and static shapes pad "
                "it to the longest that a record can be; set runtime.static_shapes=false"
            )

    def _remembered_lengths(self) -> list[str]:
        """Return a name for every length whose loss changes once a longer example was seen."""
        examples = [batch[0] for batch in self.batches]
        with torch.no_grad():
            before = [float(self._losses([example])[0]) for example in examples]
            after = [float(self._losses([example])[0]) for example in reversed(examples)]
        return [
            f"the loss of {len(example)} tokens"
            for example, one, other in zip(examples, before, reversed(after), strict=True)
            if not math.isclose(one, other, rel_tol=_REMEMBERED) and math.isfinite(one)
        ]

    def _alone(self, example: Example, seed: int = 0) -> list[torch.Tensor]:
        return self._gradient(self._losses([example], seed)[0])

    def _losses(
        self, chosen: Sequence[Example], seed: int = 0, rows: int | None = None, length: int | None = None
    ) -> torch.Tensor:
        base = self.adapted.base
        torch.manual_seed(seed)
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


class _Picking(TorchDispatchMode):
    """Notes, while inside, the first operator that picks rows by their values."""

    found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if self.found is None and (by_mask or name in _PICKING):
            self.found = name
        return func(*args, **(kwargs or {}))


def _refuse_memory(changed: Sequence[str]) -> None:
    if changed:
        raise PrivacyError(
            f"the network remembers the examples it saw: a dry run changed {changed[0]}, so one record's influence "
            "reaches the gradients of others and has no bound; use a model without such a state"
        )


def _finite(gradient: Sequence[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in gradient)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
