"""The federation's rounds, in reading order.

Cohort, reserve, instruct, collect, combine (and noise), commit, step, evaluate, checkpoint, report.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from flwr.serverapp import Grid

from conf.schema.experiment import Experiment
from protocol.errors import FederationError
from protocol.instructions import ClientPlan, Instruction, InstructionHeader, client_plan
from protocol.tensors import NamedTensors, digest, layout_of
from server.cohort import enroll
from server.collect import Collected, collect
from server.evaluation import Evaluator
from server.events import Evaluated, Observer, RoundFinished, RoundStarted, RunFinished, RunStarted
from server.protection import Protection, protection_for
from server.run_directory import RunDirectory
from strategies.base import Strategy
from strategies.build import build_strategy

__all__ = ["Outcome", "run_federation"]


@dataclass(frozen=True)
class Outcome:
    """The final adapter and its last evaluation."""

    adapter: NamedTensors
    evaluation: Evaluated | None


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round."""

    experiment: Experiment
    plan: ClientPlan
    base_digest: str
    strategy: Strategy
    trained: frozenset[str]
    protection: Protection
    timeout_s: float


def run_federation(
    grid: Grid,
    experiment: Experiment,
    evaluator: Evaluator,
    directory: RunDirectory,
    observe: Observer,
    *,
    expected_sites: int,
    timeout_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Run every round of an experiment and return the final adapter.

    Raises:
        FederationError: too few sites, or a round with fewer valid replies than `federation.min_replies`.
        PrivacyError: client-level privacy that these sites cannot have, or a budget that does not cover a round.
    """
    began = clock()
    federation = experiment.federation
    adapter: NamedTensors = evaluator.initial_adapter(experiment.seed)
    strategy = build_strategy(experiment.strategy)
    members = enroll(grid, expected_sites, timeout_s)
    protection = protection_for(experiment, strategy, members, directory)
    run = _Run(
        experiment,
        client_plan(experiment, directory.run),
        evaluator.base_digest,
        strategy,
        strategy.trained(frozenset(adapter)),
        protection,
        timeout_s,
    )
    observe = protection.observer(observe)
    values = sum(adapter[name].numel() for name in run.trained)
    observe(RunStarted(directory.run, federation.rounds, tuple(member.site for member in members), values))
    evaluation = _evaluate(evaluator, adapter, 0, experiment, observe)
    with closing(protection):
        for number in range(1, federation.rounds + 1):
            adapter, evaluation = _round(grid, run, number, adapter, evaluation, evaluator, directory, observe, clock)
    directory.save_adapter(evaluator.adapted, adapter)
    observe(RunFinished(directory.run, clock() - began, digest(adapter)))
    return Outcome(adapter, evaluation)


def _round(
    grid: Grid,
    run: _Run,
    round_number: int,
    adapter: NamedTensors,
    evaluation: Evaluated | None,
    evaluator: Evaluator,
    directory: RunDirectory,
    observe: Observer,
    clock: Callable[[], float],
) -> tuple[NamedTensors, Evaluated | None]:
    """Return the adapter after one round, and the latest evaluation."""
    began = clock()
    protection = run.protection
    cohort = protection.cohort(round_number)
    observe(RoundStarted(round_number, tuple(member.site for member in cohort)))

    instruction = _instruction(run, round_number, adapter)
    layout = layout_of(instruction.tensors)
    protection.reserve(round_number, layout)
    collected = collect(grid, instruction, cohort, protection.fold, observe, expected=layout, timeout_s=run.timeout_s)
    if protection.needs_replies:
        _check_quorum(collected, run.experiment.federation.min_replies, round_number)

    aggregating = clock()
    combined = protection.combined()
    spent = protection.commit()
    adapter = run.strategy.step(adapter, combined)
    aggregate_s = collected.aggregating_s + clock() - aggregating

    evaluating = clock()
    evaluation = _evaluate(evaluator, adapter, round_number, run.experiment, observe) or evaluation
    evaluate_s = clock() - evaluating
    directory.save_checkpoint(round_number, adapter)
    other_s = clock() - began - collected.waiting_s - aggregate_s - evaluate_s
    observe(
        RoundFinished(
            round_number,
            collected.accepted,
            collected.rejected,
            _norm(combined),
            collected.waiting_s,
            aggregate_s,
            evaluate_s,
            other_s,
            spent,
        )
    )
    return adapter, evaluation


def _instruction(run: _Run, round_number: int, adapter: NamedTensors) -> Instruction:
    header = InstructionHeader(
        round=round_number,
        plan=run.plan,
        plan_digest=run.plan.digest,
        base_digest=run.base_digest,
        adapter_digest=digest(adapter),
        clip_norm=run.protection.clip_norm,
        release=run.protection.claim,
    )
    # What no site trains has its initial value everywhere, and a site derives that from the public seed.
    return Instruction(header, {name: adapter[name] for name in sorted(run.trained)})


def _check_quorum(collected: Collected, min_replies: int, round_number: int) -> None:
    if collected.accepted < min_replies:
        raise FederationError(
            f"round {round_number} has {collected.accepted} valid replies and {collected.rejected} others, "
            f"federation.min_replies={min_replies}; the log names each site's reason"
        )


def _evaluate(
    evaluator: Evaluator, adapter: NamedTensors, round_number: int, experiment: Experiment, observe: Observer
) -> Evaluated | None:
    every, last = experiment.evaluation.every, experiment.federation.rounds
    if every == 0 or (round_number % every and round_number != last):
        return None
    evaluated = evaluator.evaluate(adapter, round_number)
    if evaluated is not None:
        observe(evaluated)
    return evaluated


def _norm(tensors: NamedTensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
