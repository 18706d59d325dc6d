"""Checks of the books: what was executed is what was booked, and the stated (ε, δ) is its price."""

from __future__ import annotations

from scipy import stats

from conf.schema.privacy import NoPrivacy
from privacy.accounting import epsilon_of
from privacy.doctor.subject import FALSE_ALARM, ObservedRound, Subject, Verdict
from privacy.mechanisms import SubsampledGaussian, Truncation

__all__ = ["booked_is_what_was_executed", "delta_is_for_the_whole_run", "empty_batches_are_steps", "statement_is_true"]

_BOOKED = "booked is what was executed"
_EMPTY = "an empty batch is a step with noise"
_STATEMENT = "stated ε is the price of all rounds"
_DELTA = "δ is for the whole run"
_ROUNDING = 1e-6


def booked_is_what_was_executed(subject: Subject) -> Verdict:
    """After each round the ledger holds one entry more, with the steps, rate and noise that were observed.

    Also where no loss is finite, and at a site whose own file asks for fewer steps than the plan.
    """
    if not subject.plan.is_private:
        return Verdict(_BOOKED, None, "nothing is booked")
    expected: list[SubsampledGaussian] = []
    for number, observed in enumerate(subject.trained, start=1):
        expected.append(_executed(subject, len(observed.steps)))
        if len(observed.booked) != number:
            return Verdict(_BOOKED, False, f"the ledger holds {len(observed.booked)} entries after round {number}")
        wrong = _difference(observed.booked[-1], expected[-1])
        if wrong or tuple(observed.booked) != tuple(expected):
            return Verdict(_BOOKED, False, f"round {number}: {wrong or 'an earlier entry was changed'}")
    fault, evidence = _rate(subject)
    fault = fault or _other_steps(subject)
    if fault:
        return Verdict(_BOOKED, False, fault)
    steps = [len(observed.steps) for observed in subject.trained]
    return Verdict(_BOOKED, True, f"{' + '.join(map(str, steps))} steps booked and executed; {evidence}")


def empty_batches_are_steps(subject: Subject) -> Verdict:
    """A site whose draws are empty takes, books and noises every step: a missing one would tell that nothing was drawn.

    Without privacy an empty batch must still be a step, for the sake of comparison.
    """
    steps, planned = subject.starved.first.steps, subject.starved.steps
    empty = [step for step in steps if not step.units]
    evidence = f"{len(steps)} of {planned} steps taken, {len(empty)} of them on an empty batch"
    if len(steps) != planned or not empty:
        return Verdict(_EMPTY, False, evidence)
    if subject.starved.first.header.steps != planned:
        return Verdict(_EMPTY, False, f"{evidence}; the reply states {subject.starved.first.header.steps}")
    if not subject.plan.is_private:
        return Verdict(_EMPTY, True, evidence)
    silent = sum(1 for step in empty if not all(bool(part.any()) for part in step.gradient))
    return Verdict(_EMPTY, silent == 0, f"{evidence}, {silent} without noise on every tensor")


def statement_is_true(subject: Subject) -> Verdict:
    """The ε of each reply is recomputed from the observed steps of all rounds so far."""
    if not subject.plan.is_private:
        stated = [observed.header.privacy for observed in subject.trained if observed.header.privacy is not None]
        return Verdict(
            _STATEMENT, None if not stated else False, "nothing is promised" if not stated else "ε is stated"
        )
    executed: list[SubsampledGaussian] = []
    for number, observed in enumerate(subject.trained, start=1):
        executed.append(_executed(subject, len(observed.steps)))
        fault = _false_statement(subject, observed, executed)
        if fault:
            return Verdict(_STATEMENT, False, f"round {number}: {fault}")
    last = subject.trained[-1].header.privacy
    evidence = f"ε={last.epsilon_run:.4f} after {last.steps_executed} steps" if last else ""
    return Verdict(_STATEMENT, True, f"{evidence}, recomputed from what was observed")


def delta_is_for_the_whole_run(subject: Subject) -> Verdict:
    """δ is below 1/n, and at that one δ all steps of all rounds together cost at most the target ε."""
    plan, promise, asked = subject.plan, subject.promise, subject.promise.privacy
    if plan.delta is None or isinstance(asked, NoPrivacy):
        return Verdict(_DELTA, None, "nothing is promised")
    least = min(promise.published_units, promise.num_units)
    if plan.delta >= 1 / least:
        return Verdict(_DELTA, False, f"δ={plan.delta:.3g} is not below 1/n={1 / least:.3g}")
    stated = {observed.header.privacy.delta for observed in subject.trained if observed.header.privacy}
    if stated != {plan.delta}:
        return Verdict(_DELTA, False, f"the replies state δ={stated}, the plan has δ={plan.delta:.3g}")
    whole = epsilon_of([_executed(subject, promise.local.steps * promise.rounds)], plan.delta)
    target = asked.target_epsilon
    evidence = f"all {promise.local.steps * promise.rounds} steps cost ε={whole:.4f} at δ={plan.delta:.3g}"
    if target is None:
        return Verdict(_DELTA, True, evidence)
    return Verdict(_DELTA, whole <= target * (1 + _ROUNDING), f"{evidence}, target {target:g}")


def _executed(subject: Subject, steps: int) -> SubsampledGaussian:
    """Return what `steps` steps amount to, from what was asked for and not through the plan's own bookkeeping.

    The noise's size is the plan's: that it is really added is checked on the silenced rounds.
    """
    plan, promise = subject.plan, subject.promise
    noise = plan.noise_multiplier
    if plan.loss is not None:
        noise = (noise**-2 + plan.loss.noise_multiplier**-2) ** -0.5
    cap, slots = plan.sampling.cap, promise.published_units
    cut = None if cap is None or cap >= slots else Truncation(slots, cap)
    return SubsampledGaussian(promise.expected_batch / slots, noise, steps, cut, plan.discrete)


def _other_steps(subject: Subject) -> str:
    """Return a fault or "": the rounds beside the trained ones take, book and state the steps that were asked for."""
    asked = {"silenced": subject.promise.local.steps, "starved": subject.starved.steps}
    seen = {"silenced": subject.silenced, "starved": (subject.starved.first, subject.starved.twin)}
    for name, rounds in seen.items():
        for observed in rounds:
            told = len(observed.steps), observed.header.steps, observed.booked[-1].steps if observed.booked else 0
            if set(told) != {asked[name]}:
                taken, stated, booked = told
                return f"{name} round: {asked[name]} steps asked, {taken} taken, {stated} stated, {booked} booked"
    return ""


def _difference(booked: SubsampledGaussian, executed: SubsampledGaussian) -> str:
    pairs = (
        ("steps", booked.steps, executed.steps),
        ("rate", booked.sampling_rate, executed.sampling_rate),
        ("noise", booked.noise_multiplier, executed.noise_multiplier),
        ("truncation", booked.truncation, executed.truncation),
        ("discrete", booked.discrete, executed.discrete),
    )
    return "; ".join(f"{name} {left} booked, {right} executed" for name, left, right in pairs if left != right)


def _rate(subject: Subject) -> tuple[str, str]:
    """Return a fault or "", and the evidence: the units looked up in all steps are a binomial number."""
    steps = [step for observed in subject.trained for step in observed.steps]
    seen = sum(len(step.units) for step in steps)
    rate = subject.promise.expected_batch / subject.promise.published_units
    trials = min(subject.promise.num_units, subject.promise.published_units) * len(steps)
    law = stats.binom(trials, rate)
    # A cut draws fewer than that, which costs nothing: the lower tail is tested where no draw can be cut.
    chance = float(law.sf(seen - 1)) * 2
    if subject.plan.sampling.truncation is None:
        chance = min(chance, 2 * float(law.cdf(seen)))
    evidence = f"{seen} units used, {trials * rate:.1f} expected (p {min(chance, 1.0):.2g}, error rate {FALSE_ALARM:g})"
    return (evidence if chance < FALSE_ALARM else "", evidence)


def _false_statement(subject: Subject, observed: ObservedRound, executed: list[SubsampledGaussian]) -> str:
    stated, plan = observed.header.privacy, subject.plan
    if stated is None or plan.delta is None:
        return "the reply states no ε"
    true = epsilon_of(executed, plan.delta)
    if abs(stated.epsilon_run - true) > _ROUNDING * true:
        return f"the reply states ε={stated.epsilon_run:.4f}, the observed steps cost ε={true:.4f}"
    if stated.epsilon_total < true * (1 - _ROUNDING):
        return f"the ledger's total is ε={stated.epsilon_total:.4f}, the observed steps cost ε={true:.4f}"
    steps = sum(mechanism.steps for mechanism in executed)
    if stated.steps_executed != steps:
        return f"the reply states {stated.steps_executed} steps, {steps} were observed"
    if (stated.unit, stated.clip_norm, stated.noise_multiplier) != (plan.unit, plan.clip_norm, plan.noise_multiplier):
        return "unit, clip norm or noise of the reply are not the plan's"
    return ""
