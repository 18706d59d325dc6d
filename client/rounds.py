"""One round at a site, in reading order: policy, reserve, train, difference, commit, reply."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from client.policy import check_policy
from client.state import SiteState
from conf.schema.privacy import NoPrivacy, local_privacy
from conf.schema.site import SiteFile
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example
from finetuning.loop import TrainingDiagnostics, train_locally
from finetuning.tasks.build import build_objective
from privacy.accounting import epsilon_of
from privacy.gradients import GradientRule, gradient_rule
from privacy.ledger import Booking, Ledger, Reservation
from privacy.plan import PrivacyPlan, build_plan
from privacy.randomness import SecureStream
from protocol.errors import BudgetExceeded, PrivacyError, ReplyRejected, SiteRefusal
from protocol.instructions import ClientPlan, Instruction, PrivacyStatement, Reply, ReplyHeader
from protocol.tensors import digest, layout_of, subtract, verify
from strategies.build import build_strategy

__all__ = ["RoundWork", "answer", "rehearse"]


@dataclass(frozen=True)
class RoundWork:
    """What a site brings to a round."""

    file: SiteFile
    state: Callable[[], SiteState]
    adapted: Callable[[ClientPlan], AdaptedModel]
    examples: Callable[[AdaptedModel], Sequence[Example]]


def answer(instruction: Instruction, work: RoundWork) -> Reply:
    """Return the update of one round, or a refusal. Nothing is spent before every check has passed."""
    try:
        return _train(instruction, work)
    except SiteRefusal as refusal:
        return _refusal(instruction, work, refusal.code, str(refusal))
    except BudgetExceeded as exceeded:
        return _refusal(instruction, work, "budget_exceeded", str(exceeded))


def _train(instruction: Instruction, work: RoundWork) -> Reply:
    header, plan = instruction.header, instruction.header.plan
    check_policy(work.file, header)
    adapted = work.adapted(plan)
    trained_names = build_strategy(plan.strategy).trained(adapted.names)
    start = _starting_adapter(instruction, adapted, trained_names)
    examples = work.examples(adapted)
    privacy = _privacy_plan(plan, work.file, len(examples))
    stream = _stream(plan, work.file.name, header.round, examples)
    rule = _gradients(plan, privacy, adapted, trained_names, stream)
    ledger = work.state().open_ledger(_content(example) for example in examples) if privacy.is_private else None

    try:
        reservation = _reserve(ledger, privacy, instruction, examples)
        adapted.load(start)
        diagnostics = _run_steps(instruction, work, adapted, trained_names, examples, rule, _dropout_seed(stream))
    finally:
        rule.close()
    update = subtract(adapted.extract(), start, trained_names)
    if reservation is not None and ledger is not None:
        ledger.commit(reservation, digest(update))

    return Reply(
        ReplyHeader(
            status="trained",
            site=work.file.name,
            round=header.round,
            plan_digest=header.plan_digest,
            base_digest=adapted.base.digest,
            adapter_digest=header.adapter_digest,
            privacy=_statement(privacy, ledger, plan),
            metrics=_released(diagnostics, work.file),
        ),
        update,
    )


def rehearse(plan: ClientPlan, work: RoundWork) -> PrivacyPlan:
    """Do everything that comes before spending, and return the privacy plan: the site's operator sees what is wrong.

    Raises:
        CloisterError: the data, the model, the adapter or the budget does not fit the plan.
    """
    adapted = work.adapted(plan)
    trained_names = build_strategy(plan.strategy).trained(adapted.names)
    privacy = _privacy_plan(plan, work.file, len(work.examples(adapted)))
    _gradients(plan, privacy, adapted, trained_names, SecureStream.from_operating_system()).close()
    budget = work.file.budget
    if privacy.is_private and budget is not None:
        one_step = epsilon_of([privacy.mechanism(1)], budget.delta)
        if one_step > budget.epsilon:
            raise BudgetExceeded(
                f"site {work.file.name}: a single step costs ε={one_step:.3f}, above the site's whole budget of "
                f"{budget.epsilon:g} at δ={budget.delta:.3g}; raise the noise or the budget"
            )
    return privacy


def _starting_adapter(
    instruction: Instruction, adapted: AdaptedModel, trained_names: frozenset[str]
) -> Mapping[str, torch.Tensor]:
    """Return the whole adapter: what was sent, and what the site derives from the public seed."""
    header = instruction.header
    if adapted.base.digest != header.base_digest:
        raise SiteRefusal(
            "wrong_base",
            f"this site's base has digest {adapted.base.digest[:12]}, the server's {header.base_digest[:12]}; "
            "install the same model files",
        )
    initial = adapted.initial(header.plan.adapter_seed)
    expected = {name: shape for name, shape in layout_of(initial).items() if name in trained_names}
    try:
        verify(instruction.tensors, expected)
    except ReplyRejected as problem:
        raise SiteRefusal(problem.code, f"the adapter sent by the server is unusable: {problem}") from problem
    start = initial | dict(instruction.tensors)
    if digest(start) != header.adapter_digest:
        raise SiteRefusal("adapter_digest", "the adapter does not match its digest; server and site differ in version")
    return start


def _privacy_plan(plan: ClientPlan, file: SiteFile, num_records: int) -> PrivacyPlan:
    try:
        return build_plan(
            local_privacy(plan.privacy),
            plan.local,
            rounds=plan.rounds,
            published_units=file.published_records,
            num_units=num_records,
            site_delta=None if file.budget is None else file.budget.delta,
        )
    except PrivacyError as error:
        raise PrivacyError(f"site {file.name}: {error}") from error


def _reserve(
    ledger: Ledger | None, privacy: PrivacyPlan, instruction: Instruction, examples: Sequence[Example]
) -> Reservation | None:
    """Book the round's steps before they are executed; the ledger refuses what the budget does not cover."""
    if not privacy.is_private:
        return None
    if ledger is None:
        raise SiteRefusal("no_budget", "this site has no privacy budget; its operator must set one in the site file")
    header = instruction.header
    inputs = "|".join((header.plan_digest, header.base_digest, header.adapter_digest, _fingerprint(examples)))
    booking = Booking(
        run=header.plan.run,
        round=header.round,
        plan_digest=header.plan_digest,
        schedule=privacy.whole_run,
        mechanism=privacy.mechanism(privacy.steps_per_round),
        inputs_digest=hashlib.sha256(inputs.encode()).hexdigest(),
    )
    # The noise is drawn anew every time, so no execution is a replay of another.
    return ledger.reserve(booking, fresh=True)


def _gradients(
    plan: ClientPlan,
    privacy: PrivacyPlan,
    adapted: AdaptedModel,
    trained_names: frozenset[str],
    stream: SecureStream,
) -> GradientRule:
    """Return what makes the gradients; a layer without a rule is refused here, before anything is spent."""
    asked = local_privacy(plan.privacy)
    per_example = "" if isinstance(asked, NoPrivacy) else asked.per_example_gradients
    return gradient_rule(privacy, per_example, adapted.network, adapted.train_only(trained_names), stream)


def _run_steps(
    instruction: Instruction,
    work: RoundWork,
    adapted: AdaptedModel,
    trained_names: frozenset[str],
    examples: Sequence[Example],
    rule: GradientRule,
    dropout_seed: int,
) -> TrainingDiagnostics:
    header, plan = instruction.header, instruction.header.plan
    diagnostics = train_locally(
        adapted,
        adapted.train_only(trained_names),
        examples,
        build_objective(plan.task),
        rule,
        plan.local,
        seed=dropout_seed,
        micro_batch_tokens=work.file.runtime.micro_batch_tokens,
        learning_rate_factor=plan.local.learning_rate_factor(header.round, plan.rounds),
    )
    work.state().record_diagnostics(header.round, diagnostics, clipped=rule.clipped, non_finite=rule.non_finite)
    return diagnostics


def _stream(plan: ClientPlan, site: str, round_number: int, examples: Sequence[Example]) -> SecureStream:
    """Return the randomness of sampling, noise and dropout: the operating system's, unless it is to be repeatable.

    A repeatable stream is bound to everything that makes the run: other settings or other records get other noise, or
    the difference of two runs would be free of it. Without privacy there is nothing to hide, and a run is repeatable.
    """
    asked = local_privacy(plan.privacy)
    seed = plan.adapter_seed if isinstance(asked, NoPrivacy) else asked.insecure_seed
    if seed is None:
        return SecureStream.from_operating_system()
    settings = plan.model_copy(update={"run": "any"}).digest
    return SecureStream.insecure(seed, site, round_number, settings, _fingerprint(examples))


def _fingerprint(examples: Sequence[Example]) -> str:
    """Return the SHA-256 (hex) of a site's tokenized records, in order. It never leaves the site."""
    state = hashlib.sha256()
    for example in examples:
        state.update(_content(example))
    return state.hexdigest()


def _content(example: Example) -> bytes:
    return f"|{len(example)}|{example.label}|".encode() + example.input_ids.tobytes() + example.trained.tobytes()


def _dropout_seed(stream: SecureStream) -> int:
    """Return a seed that nobody knows.

    Which mask a record meets depends on the others in its batch. Secret masks are independent of each other whatever
    was drawn, so the sensitivity bound holds for each of them; with a public seed it would not.
    """
    return int(stream.uniform(1)[0] * 2**53)


def _released(diagnostics: TrainingDiagnostics, file: SiteFile) -> dict[str, float]:
    """Return the metrics that the site's policy lets out; by default none."""
    if not file.policy.release_training_loss or not math.isfinite(diagnostics.mean_loss):
        return {}
    return {"training_loss": diagnostics.mean_loss}


def _statement(privacy: PrivacyPlan, ledger: Ledger | None, plan: ClientPlan) -> PrivacyStatement | None:
    """Return what the site's protection costs so far; None where nothing is promised."""
    if not privacy.is_private or ledger is None:
        return None
    booked = ledger.mechanisms(plan.run)
    return PrivacyStatement(
        unit=privacy.unit,
        relation=privacy.relation,
        epsilon_run=privacy.epsilon(booked),
        epsilon_total=ledger.spent(),
        epsilon_budget=ledger.budget.epsilon,
        delta=privacy.delta,
        accountant=privacy.accountant,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        sampling_rate=privacy.sampling.rate,
        steps_executed=sum(mechanism.steps for mechanism in booked),
        insecure_seed=_insecure(plan),
    )


def _insecure(plan: ClientPlan) -> bool:
    asked = local_privacy(plan.privacy)
    return not isinstance(asked, NoPrivacy) and asked.insecure_seed is not None


def _refusal(instruction: Instruction, work: RoundWork, code: str, reason: str) -> Reply:
    return Reply(
        ReplyHeader(
            status="refused",
            site=work.file.name,
            round=instruction.header.round,
            plan_digest=instruction.header.plan_digest,
            code=code,
            reason=reason,
        )
    )
