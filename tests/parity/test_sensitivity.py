"""What one record can do to the sum that is noised: at most the clip norm, whatever its neighbors are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema.federation import SGD, LocalTraining
from finetuning.batches import Example, collate
from finetuning.loop import train_locally
from finetuning.tasks.build import build_objective
from privacy.gradients import gradient_rule
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling

ROUNDING = 1e-5
Make = Callable[..., Any]


def random_batch(seed: int, make_examples: Make, classes: int | None) -> list[Example]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 40, size=generator.integers(2, 9)).tolist()
    return make_examples(lengths, seed=seed, classes=classes)


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: left[name] - right[name] for name in left}


@pytest.mark.parametrize(
    ("family", "per_example"),
    [(family, "native") for family in ("llama", "gemma2", "phi3", "gpt2", "bert", "roberta")]
    + [(family, other) for family in ("llama", "bert") for other in ("opacus", "one_by_one")],
)
def test_removing_any_example_moves_the_sum_by_at_most_the_clip_norm(
    family: str, per_example: str, bench: Make, make_examples: Make, total_norm: Make
) -> None:
    made = bench(family)
    reached = 0.0
    for seed in range(4):
        examples = random_batch(seed, make_examples, 3 if family in ("bert", "roberta") else None)
        norms = sorted(total_norm(made.gradient(example)) for example in examples)
        # Half of the records are longer than the clip norm, so that scaling by a neighbor would show.
        clip_norm = norms[len(norms) // 2] * 0.999
        whole = made.batched(examples, clip_norm, per_example)
        for left_out in range(len(examples)):
            rest = [example for position, example in enumerate(examples) if position != left_out]
            moved = total_norm(difference(whole, made.batched(rest, clip_norm, per_example)))
            assert moved <= clip_norm * (1 + ROUNDING)
            reached = max(reached, moved / clip_norm)
    assert reached > 0.999, "no record was clipped: the bound was never tested"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_stock_loss_breaks_that_bound(family: str, bench: Make, make_examples: Make, total_norm: Make) -> None:
    """The control: `labels=` divides by the tokens of the batch, so one long record rescales all the others."""
    made = bench(family)
    examples = make_examples([4, 5, 6, 4, 5, 40], seed=1)
    network, pad = made.adapted.network, made.adapted.base.pad_token_id

    def stock(chosen: list[Example]) -> dict[str, torch.Tensor]:
        batch = collate(chosen, pad)
        rule = made.rule(clip_norm)
        network.train()
        try:
            loss = network(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets).loss
            rule.accumulate(loss.expand(batch.size))
            rule.finish()
            return {name: each.grad.double() for name, each in made.trained.items()}
        finally:
            rule.close()

    clip_norm = max(total_norm(made.gradient(example)) for example in examples)
    moved = total_norm(difference(stock(examples), stock(examples[:-1])))
    assert moved > 1.2 * clip_norm
    ours = total_norm(difference(made.batched(examples, clip_norm), made.batched(examples[:-1], clip_norm)))
    assert ours <= clip_norm * (1 + ROUNDING)


def test_a_gradient_does_not_depend_on_the_neighbors(bench: Make, make_examples: Make, error_of: Make) -> None:
    """Additivity: the sum over a batch is the sum over its halves, unclipped, to rounding."""
    made = bench("llama")
    examples = make_examples([3, 40, 7, 12], seed=5)
    halves = [made.batched(examples[:2], 1e30), made.batched(examples[2:], 1e30)]
    assert error_of(made.batched(examples, 1e30), {name: halves[0][name] + halves[1][name] for name in halves[0]}) < (
        ROUNDING
    )


@pytest.mark.parametrize("per_example", ["native", "opacus", "one_by_one"])
def test_an_example_with_nothing_to_learn_adds_nothing(
    per_example: str, bench: Make, make_examples: Make, error_of: Make
) -> None:
    made = bench("llama")
    examples = make_examples([9, 14, 6], seed=2)
    silent = replace(examples[1], trained=np.zeros(14, dtype=np.bool_))
    batch = collate([silent], made.adapted.base.pad_token_id)
    assert build_objective(made.task).losses(made.adapted.network, batch).tolist() == [0.0]
    with_it = made.batched([examples[0], silent, examples[2]], 0.05, per_example)
    assert error_of(with_it, made.batched([examples[0], examples[2]], 0.05, per_example)) < ROUNDING
    assert not any(tensor.any() for tensor in made.batched([silent], 0.05, per_example).values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("per_example", ["native", "opacus", "one_by_one"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_non_finite_gradient_adds_nothing_and_is_counted(
    poison: float, per_example: str, family: str, bench: Make, make_examples: Make, error_of: Make
) -> None:
    made = bench(family)
    examples = make_examples([9, 14, 6], seed=2, classes=3 if family == "bert" else None)
    marked = 7
    for example in examples:
        example.input_ids[example.input_ids == marked] = marked + 1
    examples[1].input_ids[3] = marked

    def poisoned(module: object, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return torch.where((arguments[0] == marked)[..., None], torch.full_like(output, poison), output)

    objective, network = build_objective(made.task), made.adapted.network
    handle = network.get_input_embeddings().register_forward_hook(poisoned)
    rule = made.rule(0.05, per_example=per_example)
    network.train()
    try:
        for group in [examples] if rule.max_micro_batch is None else [[example] for example in examples]:
            rule.accumulate(objective.losses(network, collate(group, made.adapted.base.pad_token_id)))
        rule.finish()
    finally:
        rule.close()
        handle.remove()
    summed = {name: each.grad.double() for name, each in made.trained.items()}
    assert rule.non_finite == 1
    assert error_of(summed, made.one_at_a_time([examples[0], examples[2]], 0.05)) < ROUNDING


@pytest.mark.parametrize("per_example", ["native", "opacus", "one_by_one"])
def test_an_empty_draw_leaves_noise_of_the_right_size(per_example: str, bench: Make, make_plan: Make) -> None:
    made = bench("llama")
    plan = make_plan(0.5, 1.4, normalizer=7.0)
    rule = gradient_rule(plan, per_example, made.adapted.network, made.trained, SecureStream.insecure(1))
    try:
        rule.finish()
        first = torch.cat([each.grad.flatten() for each in made.trained.values()])
        rule.finish()
        second = torch.cat([each.grad.flatten() for each in made.trained.values()])
    finally:
        rule.close()
    expected = 1.4 * 0.5 / 7.0
    # The standard deviation of n draws is known to 1/sqrt(2n); five of them fail once in a million runs.
    error = 5 / (2 * first.numel()) ** 0.5
    for drawn in (first, second):
        assert float(drawn.std()) == pytest.approx(expected, rel=error)
        assert abs(float(drawn.mean())) < 5 * expected / drawn.numel() ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / first.numel() ** 0.5


def test_a_round_of_empty_draws_still_moves_by_its_noise(bench: Make, make_plan: Make, make_examples: Make) -> None:
    made = bench("llama")
    plan = replace(make_plan(0.5, 2.0, normalizer=4.0), sampling=PoissonSampling(1e-12, 100))
    before = made.adapted.extract()
    rule = gradient_rule(plan, "native", made.adapted.network, made.trained, SecureStream.insecure(2))
    local = LocalTraining(steps=3, expected_batch_size=4, optimizer=SGD(learning_rate=1.0))
    objective = build_objective(made.task)
    try:
        diagnostics = train_locally(
            made.adapted,
            made.trained,
            make_examples([5, 6]),
            objective,
            rule,
            local,
            seed=0,
            micro_batch_tokens=64,
        )
    finally:
        rule.close()
    assert (diagnostics.steps, diagnostics.examples, diagnostics.mean_loss) == (3, 0, 0.0)
    after = made.adapted.extract()
    moved = torch.cat([(after[name] - before[name]).flatten() for name in made.trained])
    assert float(moved.std()) == pytest.approx(3**0.5 * 2.0 * 0.5 / 4.0, rel=5 / (2 * moved.numel()) ** 0.5)


def test_the_normalizer_is_a_constant(bench: Make, make_plan: Make, make_examples: Make, error_of: Make) -> None:
    """One record or five: the sum is divided by the plan's number, which tells nothing about the draw."""
    made = bench("llama")
    objective, pad = build_objective(made.task), made.adapted.base.pad_token_id
    examples = make_examples([9, 14, 6, 21, 3])
    for count in (1, 5):
        rule = gradient_rule(
            make_plan(0.05, 0.0, normalizer=8.0), "native", made.adapted.network, made.trained, SecureStream.insecure(1)
        )
        made.adapted.network.train()
        try:
            rule.accumulate(objective.losses(made.adapted.network, collate(examples[:count], pad)))
            rule.finish()
        finally:
            rule.close()
        ours = {name: each.grad.double() * 8.0 for name, each in made.trained.items()}
        assert error_of(ours, made.one_at_a_time(examples[:count], 0.05)) < ROUNDING


@pytest.mark.parametrize("static_shapes", [False, True])
def test_micro_batches_change_no_number_of_a_round(
    static_shapes: bool, bench: Make, make_plan: Make, make_examples: Make, error_of: Make
) -> None:
    """The same draws and the same noise, whatever memory a site has."""
    made = bench("llama")
    examples, start = make_examples([5, 17, 2, 29, 11, 17, 8], seed=1), made.adapted.extract()
    local = LocalTraining(steps=3, expected_batch_size=4, optimizer=SGD(learning_rate=0.5))
    plan = replace(make_plan(0.3, 0.5, normalizer=4.0), sampling=PoissonSampling(0.6, 7))
    results: list[dict[str, torch.Tensor]] = []
    for tokens in (1, 64, 10_000):
        made.adapted.load(start)
        rule = gradient_rule(plan, "native", made.adapted.network, made.trained, SecureStream.insecure(4))
        try:
            diagnostics = train_locally(
                made.adapted,
                made.trained,
                examples,
                build_objective(made.task),
                rule,
                local,
                seed=0,
                micro_batch_tokens=tokens,
                units=[(0, 1), (2,), (3, 4), (5,), (6,)],
                static_shapes=static_shapes,
                longest=33,
                most_records=2,
            )
        finally:
            rule.close()
        assert diagnostics.examples > 5
        results.append({name: each.double() - start[name] for name, each in made.adapted.extract().items()})
    assert error_of(results[0], results[2]) < ROUNDING
    assert error_of(results[1], results[2]) < ROUNDING
