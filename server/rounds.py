"""The federation's rounds, in reading order.

Cohort, reserve, instruct, collect, combine (and noise), commit, step, evaluate, checkpoint, report.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Set
from contextlib import closing
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from conf.schema.experiment import Experiment
from conf.schema.robust import replies_needed
from conf.schema.strategy_rules import one_rank_because_of
from protocol.errors import FederationError, ReplyRejected
from protocol.instructions import ClientPlan, Instruction, InstructionHeader, LedgerName, Reply, client_plan
from protocol.tensors import Layout, NamedTensors, check_values, digest, layout_of
from server.best import best_evaluation, why_it_stops
from server.buffered import Collector, collector_for
from server.checkpoint import Checkpoint, Heads
from server.cohort import Member, enroll, of_full_rank
from server.collect import Assignment, Collected, Waiting
from server.downlink import Downlink, downlink_for
from server.evaluation import Evaluator
from server.events import (
    BestKept,
    Evaluated,
    Observer,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunResumed,
    RunStarted,
    StoppedEarly,
)
from server.protection import Protection, protection_for
from server.root import RootTraining, root_training
from server.run_directory import RunDirectory
from strategies.base import Names, ServerState, Strategy
from strategies.build import build_strategy
from strategies.lora.factors import cut

__all__ = ["Outcome", "run_federation"]

_log = logging.getLogger(__name__)


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
    names: Names
    """Of the adapter's own tensors; a strategy may fold others into it."""
    strategy: Strategy
    protection: Protection
    downlink: Downlink
    members: tuple[Member, ...]
    collector: Collector
    root: RootTraining | None


@dataclass(frozen=True)
class _Progress:
    """What a round starts from and leaves: stored after every round."""

    adapter: NamedTensors
    state: ServerState
    evaluation: Evaluated | None
    unused: Mapping[str, tuple[int, ...]]
    """Rounds whose update was not used and whose site has not been told yet."""
    heads: Heads
    """Where each site's ledgers ended when it last answered: it is reminded, and notices a ledger that was set back."""


def run_federation(
    grid: Grid,
    experiment: Experiment,
    evaluator: Evaluator,
    directory: RunDirectory,
    observe: Observer,
    *,
    expected_sites: int,
    timeout_s: float,
    pullers: int = 0,
    waiting: Waiting | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Run every round of an experiment and return the final adapter.

    Raises:
        FederationError: too few sites; a round with fewer valid replies than `federation.min_replies`; or, with secret
            cohorts, where no round may fail, a run in which no reply was used at all.
        PrivacyError: client-level privacy that these sites cannot have, or a budget that does not cover a round.
    """
    began = clock()
    federation = experiment.federation
    strategy = build_strategy(experiment.strategy)
    checkpoint = directory.newest_checkpoint()
    names_before, keys_before = (checkpoint.members, checkpoint.keys) if checkpoint else (None, {})
    keys = {**keys_before, **federation.site_keys}
    members = enroll(grid, expected_sites, timeout_s, names=names_before, keys=keys)
    for name in sorted(federation.site_keys.keys() - {member.site for member in members}):
        _log.warning("federation.site_keys names %s, and no site of that name takes part; is it spelled right?", name)
    reason = one_rank_because_of(experiment.strategy)
    if reason is not None:
        members = of_full_rank(members, experiment.peft.rank, reason)
    _check_members(members, experiment)
    protection = protection_for(experiment, strategy, members, directory)
    plan = client_plan(experiment, directory.run)
    downlink = downlink_for(experiment.quantization, directory.run)
    collector = collector_for(federation.mode, grid, timeout_s, pullers, waiting)
    root = root_training(experiment, evaluator)
    adapter = strategy.initial(evaluator.initial_adapter(experiment.seed))
    run = _Run(
        experiment,
        plan,
        evaluator.base_digest,
        frozenset(adapter),
        strategy,
        protection,
        downlink,
        members,
        collector,
        root,
    )
    observe = protection.observer(observe)
    with closing(protection), closing(collector):
        names = tuple(member.site for member in members)
        if checkpoint is None:
            values = sum(adapter[name].numel() for name in strategy.trained(run.names, 1))
            observe(RunStarted(directory.run, federation.rounds, names, values))
            state = strategy.server.init(adapter)
            state = replace(state, numbers={**state.numbers, "population": float(len(members))})
            progress = _Progress(adapter, state, _evaluate(evaluator, adapter, 0, experiment, observe), {}, {})
        else:
            observe(RunResumed(directory.run, checkpoint.round, federation.rounds, names))
            downlink.restore(checkpoint.sent)
            protection.restore(checkpoint.protection, _uploaded(run, checkpoint.round + 1, checkpoint.adapter))
            progress = _Progress(
                checkpoint.adapter,
                checkpoint.state,
                directory.newest_evaluation(),
                checkpoint.unused,
                checkpoint.heads,
            )
        number = 0 if checkpoint is None else checkpoint.round
        directory.keep_best(number, progress.adapter)
        why = why_it_stops(experiment.evaluation, directory.events)
        while number < federation.rounds and why is None:
            number += 1
            progress = _round(run, number, progress, evaluator, directory, observe, clock)
            directory.keep_best(number, progress.adapter)
            why = why_it_stops(experiment.evaluation, directory.events)
        protection.finish()
    if why is not None and number < federation.rounds:
        observe(StoppedEarly(number, why))
    best = directory.best
    if best is not None:
        observe(BestKept(best.round))
    adapter = progress.adapter if best is None else best.adapter
    directory.save_adapter(evaluator.adapted, adapter)
    observe(RunFinished(directory.run, clock() - began, digest(adapter)))
    return Outcome(adapter, progress.evaluation if best is None else best_evaluation(directory.events))


def _round(
    run: _Run,
    round_number: int,
    progress: _Progress,
    evaluator: Evaluator,
    directory: RunDirectory,
    observe: Observer,
    clock: Callable[[], float],
) -> _Progress:
    """Return what one round makes of the adapter, the strategy's state and the latest evaluation."""
    began = clock()
    protection, server = run.protection, run.strategy.server
    adapter, state = progress.adapter, progress.state
    cohort = protection.cohort(round_number)
    observe(RoundStarted(round_number, tuple(member.site for member in cohort)))

    adapter = run.downlink.broadcast(adapter, run.strategy.downloaded(run.names, round_number), round_number)
    assignments = _assignments(run, round_number, replace(progress, adapter=adapter), cohort)
    if run.root is not None:
        state = replace(state, tensors={**state.tensors, **run.root.update(adapter, round_number)})
    aggregator = server.aggregator(adapter, state)
    protection.reserve(round_number, _uploaded(run, round_number, adapter), aggregator)

    heads, heard = dict(progress.heads), set[str]()

    def accept(site: str, reply: Reply, start: NamedTensors) -> None:
        heard.add(site)
        heads[site] = {**heads.get(site, {}), **reply.header.ledger_heads}
        protection.fold(site, reply, start)
        run.downlink.confirmed(site)

    collected = run.collector.collect(round_number, assignments, cohort, accept, observe)
    if protection.needs_replies:
        _check_quorum(collected, run.experiment, round_number)

    aggregating = clock()
    combined = protection.combined()
    spent = protection.commit()
    adapter, state = server.step(adapter, combined, state)
    _check_adapter(adapter, round_number)
    aggregate_s = collected.aggregating_s + clock() - aggregating

    evaluating = clock()
    evaluation = _evaluate(evaluator, adapter, round_number, run.experiment, observe) or progress.evaluation
    evaluate_s = clock() - evaluating
    other_s = clock() - began - collected.waiting_s - aggregate_s - evaluate_s
    observe(
        RoundFinished(
            round_number,
            collected.accepted,
            collected.rejected,
            _norm({name: tensor for name, tensor in combined.items() if name in adapter}),
            collected.waiting_s,
            aggregate_s,
            evaluate_s,
            other_s,
            spent,
            dict(aggregator.metrics()),
        )
    )
    # In a checkpoint these names would tell who was in a secret cohort, so such sites are not told, and are reminded of
    # their ledgers' heads by this process only.
    secret = protection.secret_cohort
    unused = {} if secret else _still_unused(progress.unused, heard, collected.unused, round_number)
    stored_heads = {} if secret else heads
    names = tuple(member.site for member in run.members)
    keys = {member.site: member.card.key for member in run.members if member.card.key}
    directory.save_checkpoint(
        Checkpoint(
            round_number, adapter, state, names, protection.state(), run.downlink.state(), unused, keys, stored_heads
        )
    )
    return _Progress(adapter, state, evaluation, unused, heads)


def _still_unused(
    before: Mapping[str, tuple[int, ...]], heard: Set[str], now: tuple[str, ...], round_number: int
) -> Mapping[str, tuple[int, ...]]:
    """Return what sites have to be told. A verified reply shows that this round's instruction told its site of what was
    before; any other site may not have read it, and is told again, which changes nothing if it has."""
    kept = {site: rounds for site, rounds in before.items() if site not in heard}
    return kept | {site: (*kept.get(site, ()), round_number) for site in now}


def _assignments(
    run: _Run, round_number: int, progress: _Progress, cohort: tuple[Member, ...]
) -> Mapping[str, Assignment]:
    """Return each site's work; sites of one rank that are told the same, in full or as a change, share its tensors."""
    asked = {member.site: (_rank(member, run.plan), progress.unused.get(member.site, ())) for member in cohort}
    by_kind = {kind: _assignment(run, round_number, progress, *kind) for kind in set(asked.values())}
    short = {kind: _shortened(run, assignment) for kind, assignment in by_kind.items()}
    holds = run.downlink.holds_last
    shared = {site: (short if holds(site) else by_kind)[kind] for site, kind in asked.items()}
    return {site: _reminded(each, progress.heads.get(site)) for site, each in shared.items()}


def _reminded(assignment: Assignment, heads: dict[LedgerName, str] | None) -> Assignment:
    """Return the work with the site's own ledger heads in its header."""
    if not heads:
        return assignment
    told = assignment.instruction
    header = told.header.model_copy(update={"ledger_heads": heads})
    return replace(assignment, instruction=replace(told, header=header))


def _shortened(run: _Run, full: Assignment) -> Assignment:
    instruction = run.downlink.shortened(full.instruction)
    return full if instruction is None else replace(full, instruction=instruction)


def _rank(member: Member, plan: ClientPlan) -> int | None:
    """Return the rank that a site trains where it is below the plan's."""
    rank = plan.strategy.rank_within(plan.peft.rank, member.rank)
    return None if rank == plan.peft.rank else rank


def _assignment(
    run: _Run, round_number: int, progress: _Progress, rank: int | None, unused: tuple[int, ...]
) -> Assignment:
    adapter = progress.adapter
    # What no site is sent has its initial value everywhere, and a site derives that from the public seed.
    names = run.strategy.downloaded(run.names, round_number)
    sent = run.strategy.server.download(adapter, progress.state, names, rank)
    start = {**cut(adapter, rank), **sent}
    header = InstructionHeader(
        round=round_number,
        plan=run.plan,
        plan_digest=run.plan.digest,
        base_digest=run.base_digest,
        adapter_digest=digest(start),
        clip_norm=run.protection.clip_norm,
        unused_rounds=unused,
        release=run.protection.claim,
    )
    expected = _uploaded(run, round_number, {name: start[name] for name in adapter})
    return Assignment(Instruction(header, sent), expected, sent)


def _uploaded(run: _Run, round_number: int, start: NamedTensors) -> Layout:
    """Return the layout of a valid update from `start`."""
    names = run.strategy.uploaded(run.names, round_number)
    return layout_of({name: start[name] for name in sorted(names)})


def _check_members(members: tuple[Member, ...], experiment: Experiment) -> None:
    """Refuse a rule that no round can satisfy before sites spend anything; the schema does not know who comes."""
    robust, cohort = experiment.strategy.robust, experiment.federation.cohort_size or len(members)
    needed = replies_needed(robust)
    if min(cohort, len(members)) < needed:
        raise FederationError(
            f"robust={robust.kind} needs {needed} valid replies in a round, and {min(cohort, len(members))} sites can "
            "be asked; lower strategy.robust.attackers, or connect more sites"
        )


def _check_quorum(collected: Collected, experiment: Experiment, round_number: int) -> None:
    asked, robust = experiment.federation.min_replies, experiment.strategy.robust
    needed = replies_needed(robust)
    if collected.accepted >= max(asked, needed):
        return
    bound = f"federation.min_replies={asked}" if asked >= needed else f"robust={robust.kind} needs {needed}"
    raise FederationError(
        f"round {round_number} has {collected.accepted} valid replies and {collected.rejected} others, {bound}; the "
        "log names each site's reason"
    )


def _check_adapter(adapter: NamedTensors, round_number: int) -> None:
    """Refuse what no site would take; the checkpoint before it stays the newest."""
    try:
        for name, tensor in adapter.items():
            check_values(name, tensor)
    except ReplyRejected as problem:
        raise FederationError(
            f"round {round_number} left no usable adapter: {problem}; lower the learning rates, or choose a robust rule"
        ) from problem


def _evaluate(
    evaluator: Evaluator, adapter: NamedTensors, round_number: int, experiment: Experiment, observe: Observer
) -> Evaluated | None:
    every, last = experiment.evaluation.every, experiment.federation.rounds
    if every == 0 or (round_number % every and round_number != last):
        return None
    by_class = round_number == last or experiment.evaluation.public
    evaluated = evaluator.evaluate(adapter, round_number, by_class=by_class)
    if evaluated is not None:
        observe(evaluated)
    return evaluated


def _norm(tensors: NamedTensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
