"""A server may send any adapter: large values amplify rounding until it is no rounding any more (decision 0016).

A record's influence is bounded by C because every other record's gradient stays what it was, bit for bit, whoever is
drawn beside it. The control is the batch of yesterday: all records in one, padded to the longest.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from finetuning.batches import Example, collate
from finetuning.tasks.build import build_objective

Make = Callable[..., Any]
ROUNDING = 1e-4
SHORT, LONG = (4, 11), 30
OTHERS = 23
"""Short records; with one fewer, their batch has fewer rows too (decision 0016)."""
SPREADS = (0.05, 1.0, 2.0, 3.0, 5.0, 8.0, 10.0, 100.0, 1000.0)
USUAL = 10.0
"""Above this spread, gradients may be no numbers: such a record adds nothing."""
FAMILIES = [
    ("llama", "fedit"),
    ("llama", "ffa_lora"),
    ("gpt2", "fedit"),
    ("bert", "fedit"),
    ("pooled", "fedit"),
    ("head", "fedit"),
]
"""`pooled`: BERT with a head on the mean of its last layer; `head`: that head alone, on kept summaries."""


def made_by(bench: Make, family: str, strategy: str = "fedit", **options: Any) -> Any:
    """Return a family's bench."""
    if family == "head":
        return bench("bert", strategy, "pooled", targets="none", **options)
    return bench("bert", strategy, "pooled", **options) if family == "pooled" else bench(family, strategy, **options)


def records(made: Any, seed: int) -> list[Example]:
    """Return short records and a long one, which comes last."""
    generator = np.random.default_rng(seed)
    lengths = [*generator.integers(*SHORT, OTHERS).tolist(), LONG]
    classes = 3 if made.task.kind == "classification" else None
    return [
        Example(
            generator.integers(6, 200, size).astype(np.int32),
            np.ones(size, dtype=np.bool_),
            None if classes is None else int(generator.integers(classes)),
        )
        for size in lengths
    ]


def craft(made: Any, spread: float, seed: int) -> None:
    """Put a random adapter of that size into the network; what a strategy freezes stays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.trained.values():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def moved(
    made: Any, examples: Sequence[Example], clip_norm: float, per_example: str, total_norm: Make, **options: Any
) -> float:
    """Return how far the sum moves, in clip norms, with the long record or with a short one: the farther of both."""
    whole = made.batched(examples, clip_norm, per_example, **options)
    distances: list[float] = []
    for rest in (examples[:-1], examples[1:]):
        without = made.batched(rest, clip_norm, per_example, **options)
        distances.append(total_norm({name: whole[name] - without[name] for name in whole}) / clip_norm)
    return max(distances)


@pytest.fixture(autouse=True)
def _nothing_remembered(bench: Make) -> Generator[None]:
    """Networks are shared by all tests of a process, and remember what was found of them."""
    for family in {family for family, _ in FAMILIES}:
        made_by(bench, family).adapted.checked.clear()
    yield
    for family in {family for family, _ in FAMILIES}:
        made_by(bench, family).adapted.checked.clear()


def moved_in_one_batch(made: Any, examples: Sequence[Example], clip_norm: float, total_norm: Make) -> float:
    def summed(chosen: Sequence[Example]) -> dict[str, torch.Tensor]:
        rule = made.rule(clip_norm)
        try:
            batch = collate(chosen, made.adapted.base.pad_token_id)
            rule.accumulate(build_objective(made.task).losses(made.adapted.network, batch))
            rule.finish()
            return {name: each.grad.double() for name, each in made.trained.items()}
        finally:
            rule.close()

    whole, rest = summed(examples), summed(examples[:-1])
    return total_norm({name: whole[name] - rest[name] for name in whole}) / clip_norm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("family", "strategy"), FAMILIES)
def test_no_adapter_lets_a_record_move_the_sum_by_more_than_the_clip_norm(
    family: str, strategy: str, dtype: str, bench: Make, total_norm: Make
) -> None:
    made = made_by(bench, family, strategy, dtype=dtype)
    examples = records(made, 0)
    reached, broken = 0.0, 0.0
    for seed, spread in enumerate(SPREADS):
        craft(made, spread, seed)
        clip_norm = max(1e-6, 0.5 * total_norm(made.gradient(examples[-1])))
        distance = moved(made, examples, clip_norm, "native", total_norm)
        assert distance <= 1 + ROUNDING, f"an adapter of spread {spread:g} (seed {seed}): {distance:.3f} C"
        if spread <= USUAL:
            assert total_norm(made.batched(examples, clip_norm)) > clip_norm, "most records added nothing"
        reached = max(reached, distance)
        broken = max(broken, moved_in_one_batch(made, examples, clip_norm, total_norm))
    assert reached > 0.999, "no record was clipped: the bound was never tested"
    if family != "head":  # one linear layer amplifies rounding by its size alone, which is too little to be seen
        assert broken > 1.01, "the control holds too: these adapters amplify nothing"


@pytest.mark.parametrize("per_example", ["opacus", "one_by_one"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_nor_does_any_other_way(family: str, per_example: str, bench: Make, total_norm: Make) -> None:
    made = bench(family)
    examples = records(made, 1)
    for seed, spread in enumerate((0.05, 5.0, 50.0)):
        craft(made, spread, seed)
        clip_norm = max(1e-6, 0.5 * total_norm(made.gradient(examples[-1])))
        assert moved(made, examples, clip_norm, per_example, total_norm) <= 1 + ROUNDING


def test_users_whose_records_differ_in_length(bench: Make, total_norm: Make) -> None:
    """A user is padded to the longest record of their own, and meets users who are padded as far."""
    made = bench("llama")
    examples = [*records(made, 2), *records(made, 3)]
    units = [(0, 23), (1, 2, 3), (4, 5), *((position,) for position in range(6, 23)), (24, 47), (25, 26), (27, 28)]
    for seed, spread in enumerate((0.05, 5.0, 50.0)):
        craft(made, spread, seed)
        clip_norm = max(1e-6, 0.5 * total_norm(made.gradient(examples[23])))
        whole, rest = (made.batched(examples, clip_norm, units=chosen) for chosen in (units, units[1:]))
        assert total_norm({name: whole[name] - rest[name] for name in whole}) <= clip_norm * (1 + ROUNDING)


def test_with_static_shapes(bench: Make, total_norm: Make) -> None:
    made = bench("llama")
    examples = records(made, 4)
    for seed, spread in enumerate((0.05, 5.0, 50.0)):
        craft(made, spread, seed)
        clip_norm = max(1e-6, 0.5 * total_norm(made.gradient(examples[-1])))
        whole, rest = (
            made.batched(chosen, clip_norm, static_shapes=True, longest=LONG) for chosen in (examples, examples[:-1])
        )
        assert total_norm({name: whole[name] - rest[name] for name in whole}) <= clip_norm * (1 + ROUNDING)


@contextmanager
def rounded_by_rows(made: Any) -> Generator[None]:
    """A layer whose rounding depends on how many rows there are, as another machine's kernels may."""
    layer = made.adapted.network.get_submodule("base_model.model.model.layers.0.mlp")
    own = layer.forward
    layer.forward = lambda x: own(x) * (1 + 1e-6 * len(x))
    try:
        yield
    finally:
        del layer.forward


def test_rows_that_a_kernel_computes_differently_are_computed_alone(
    bench: Make, total_norm: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A planted fault; without the check the same adapters move the sum too far."""
    made = bench("llama")
    examples = records(made, 5)
    unchecked = 0.0
    with rounded_by_rows(made), caplog.at_level(logging.WARNING):
        for seed, spread in enumerate((5.0, 8.0, 10.0, 15.0)):
            craft(made, spread, seed)
            clip_norm = max(1e-6, 0.5 * total_norm(made.gradient(examples[-1])))
            assert moved(made, examples, clip_norm, "native", total_norm) <= 1 + ROUNDING
            blind = moved(made, examples, clip_norm, "native", total_norm, alike=lambda shape: True)
            unchecked = max(unchecked, blind)
    assert unchecked > 1.05
    assert "are not computed as each one alone is, on this machine" in caplog.text


@pytest.mark.parametrize("size", [1e10, 1e25, 1e30])
def test_no_adapter_decides_what_the_check_finds(size: float, bench: Make, total_norm: Make) -> None:
    """An adapter whose gradients are all zero would make any two rows alike, and the answer is kept."""
    made = bench("llama")
    examples = records(made, 6)
    with rounded_by_rows(made):
        with torch.no_grad():
            for name, parameter in made.trained.items():
                poisoned = "layers.0.self_attn.v_proj" in name
                parameter.fill_((1.0 if "lora_A" in name else size) if poisoned else 0.0)
        made.batched(examples, 1.0)
        for seed, spread in enumerate((5.0, 8.0, 10.0, 15.0)):
            craft(made, spread, seed)
            clip_norm = max(1e-6, 0.5 * total_norm(made.gradient(examples[-1])))
            assert moved(made, examples, clip_norm, "native", total_norm) <= 1 + ROUNDING
