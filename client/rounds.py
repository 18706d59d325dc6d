"""One round at a site, in reading order: policy, reserve, train, difference, commit, clip, encode, reply."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from client.claims import check_claimed_cost
from client.ledgers import check_ledgers, heads_of
from client.policy import check_cost, check_policy
from client.state import SiteState
from client.training import Trained, TrainingJob, check_gradients, longest_record, train
from client.units import Units
from client.whole_site import WholeSite
from client.wire import outgoing, received
from conf.schema.federation import LocalTraining
from conf.schema.objective import FedDyn, Scaffold
from conf.schema.privacy import LocalPrivacy, NoPrivacy, UserLevel, adaptive_clipping, local_privacy
from conf.schema.site import SiteFile
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example
from privacy.accounting import RENYI, epsilon_of
from privacy.ledger import Booking, Ledger
from privacy.plan import PrivacyPlan, build_plan
from protocol.codecs.build import sends_changes
from protocol.errors import BudgetExceeded, LedgerUnusable, PrivacyError, ReplayDiverged, ReplyRejected, SiteRefusal
from protocol.instructions import ClientPlan, Instruction, LedgerName, PrivacyStatement, Reply, ReplyHeader
from protocol.metrics import releasable
from protocol.refusals import sentence
from protocol.tensors import NamedTensors, digest, layout_of, verify
from strategies.base import LocalRound, LocalStart, Strategy
from strategies.build import build_strategy

__all__ = ["RoundWork", "SiteRecords", "answer", "rehearse"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteRecords:
    """A site's tokenized records, and which of them belong together."""

    examples: Sequence[Example]
    units: Units
    summaries: dict[Hashable, Sequence[Example]] = field(default_factory=lambda: dict[Hashable, Sequence[Example]]())
    """The examples as frozen encoders summarize them, kept from round to round."""


@dataclass(frozen=True)
class RoundWork:
    """What a site brings to a round."""

    file: SiteFile
    state: Callable[[], SiteState]
    adapted: Callable[[ClientPlan], AdaptedModel]
    records: Callable[[AdaptedModel, LocalPrivacy, bytes], SiteRecords]
    """Takes the site's secret, which chooses among the records of a user who has too many."""
    simulated: bool = False
    """Whether a simulation made this site: only then may noise be repeatable."""


def answer(instruction: Instruction, work: RoundWork) -> Reply:
    """Return the update of one round, or a refusal. Nothing is spent before every check has passed."""
    try:
        return _round(instruction, work)
    except SiteRefusal as refusal:
        return _refusal(instruction, work, refusal.code, refusal)
    except LedgerUnusable as unusable:
        return _refusal(instruction, work, "ledger_unusable", unusable)
    except BudgetExceeded as exceeded:
        return _refusal(instruction, work, "budget_exceeded", exceeded)


def _round(instruction: Instruction, work: RoundWork) -> Reply:
    header, plan = instruction.header, instruction.header.plan
    check_policy(work.file, header, simulated=work.simulated)
    check_claimed_cost(work.file, header)
    if header.unused_rounds:
        # Spent all the same: what was sent was seen.
        _log.warning("site %s: the server did not use rounds %s", work.file.name, list(header.unused_rounds))
    adapted = work.adapted(plan)
    strategy = build_strategy(plan.strategy)
    _check_rank(plan, adapted, strategy)
    trained_names = strategy.trained(adapted.names, header.round)
    asked = local_privacy(plan.privacy)
    state, training = work.state(), _own_training(plan, work.file)
    if isinstance(plan.strategy.objective, Scaffold | FedDyn):
        # The server's books lack these rounds, and a site's own must agree with them.
        state.memory(plan.run).forget(header.unused_rounds)
    memory = state.memory(plan.run).before(header.round) if strategy.has_memory else {}
    local, downloaded = _local_round(instruction, adapted, strategy, training, state, memory)
    records = work.records(adapted, asked, state.secret)
    privacy = _privacy_plan(plan, work.file, len(records.units))
    check_cost(work.file, privacy)
    job = TrainingJob(
        file=work.file,
        header=header,
        adapted=adapted,
        trained_names=trained_names,
        local=local,
        examples=records.examples,
        units=records.units,
        privacy=privacy,
        memory=memory,
        own_training=training,
        summaries=records.summaries,
    )
    longest = longest_record(adapted, work.file)
    check_gradients(privacy, asked, adapted, trained_names, plan.task, work.file.runtime, longest)

    site_ledger = None if header.clip_norm is None else state.site_ledger()
    ledger = state.ledger(records.units) if privacy.is_private else None
    named: tuple[tuple[LedgerName, Ledger | None], ...] = (("records", ledger), ("site", site_ledger))
    ledgers: dict[LedgerName, Ledger] = {name: each for name, each in named if each is not None}
    inputs = job.inputs(state.secret)
    check_ledgers(header, ledgers, inputs)
    whole_site = None if site_ledger is None else WholeSite.reserve(site_ledger, header, inputs)
    if ledger is not None:
        trained = _booked(job, ledger, state.secret)
        stated = _statement(privacy, ledger, plan)
    else:
        trained, stated = train(job, job.stream(state.secret, attempt=1)), None
    state.record_diagnostics(header.round, trained.private_facts)
    if trained.non_finite:
        # The count follows from records: the operator may see it, no reply says it.
        _log.warning(
            "site %s, round %d: the gradients of %d draws were not finite and added nothing; lower the learning rate, "
            "or set model.dtype=fp32 where it is fp16",
            work.file.name,
            header.round,
            trained.non_finite,
        )
    leaving, below_clip = outgoing(trained.update, header, work.file.name, state.left_out(plan.run))
    if whole_site is not None:
        whole_site.commit(digest(leaving))
    if strategy.has_memory:
        state.memory(plan.run).keep(header.round, trained.memory)
    if sends_changes(plan.quantization):
        # Not before the round was paid for: a server could fill the disk by naming runs.
        state.references(plan.run).keep(header.round, downloaded)

    return Reply(
        ReplyHeader(
            status="trained",
            site=work.file.name,
            round=header.round,
            plan_digest=header.plan_digest,
            base_digest=adapted.base.digest,
            adapter_digest=header.adapter_digest,
            steps=training.steps,
            privacy=stated,
            metrics=_released(trained, job),
            ledger_heads=heads_of(ledgers),
            below_clip=below_clip if adaptive_clipping(plan.privacy) else None,
        ),
        leaving,
    )


def _booked(job: TrainingJob, ledger: Ledger, secret: bytes) -> Trained:
    """Return what training gave, booked before it was executed and committed before it may leave.

    The same instruction on the same records gets the same noise, so a repeated message, or one whose round crashed, is
    answered with the same bits and costs nothing more. Where the bits differ (another machine, another library), they
    are thrown away, and the round is booked and executed again with independent noise.
    """
    header, privacy = job.header, job.privacy
    booking = Booking(
        run=header.plan.run,
        round=header.round,
        plan_digest=header.plan_digest,
        schedule=privacy.whole_run,
        mechanism=privacy.mechanism(privacy.steps_per_round),
        inputs_digest=job.inputs(secret),
    )
    reservation = ledger.reserve(booking)
    trained = train(job, job.stream(secret, reservation.attempt))
    try:
        ledger.commit(reservation, trained.digest)
    except ReplayDiverged:
        reservation = ledger.reserve(booking, fresh=True)
        trained = train(job, job.stream(secret, reservation.attempt))
        ledger.commit(reservation, trained.digest)
    return trained


def rehearse(plan: ClientPlan, work: RoundWork) -> PrivacyPlan:
    """Do everything that comes before spending, and return the privacy plan: the site's operator sees what is wrong.

    Raises:
        CloisterError: the data, the model, the adapter or the budget does not fit the plan.
    """
    adapted = work.adapted(plan)
    asked, strategy = local_privacy(plan.privacy), build_strategy(plan.strategy)
    _check_rank(plan, adapted, strategy)
    records = work.records(adapted, asked, b"rehearsal")
    privacy = _privacy_plan(plan, work.file, len(records.units))
    for trained_names in {strategy.trained(adapted.names, number) for number in (1, 2)}:  # some strategies alternate
        longest = longest_record(adapted, work.file)
        check_gradients(privacy, asked, adapted, trained_names, plan.task, work.file.runtime, longest)
    budget = work.file.budget
    if privacy.is_private and budget is not None:
        one_step = epsilon_of([privacy.mechanism(1)], budget.delta)
        if one_step > budget.epsilon:
            raise BudgetExceeded(
                f"site {work.file.name}: a single step costs ε={one_step:.3f}, above the site's whole budget of "
                f"{budget.epsilon:g} at δ={budget.delta:.3g}; raise the noise or the budget"
            )
    return privacy


def _check_rank(plan: ClientPlan, adapted: AdaptedModel, strategy: Strategy) -> None:
    if adapted.config.rank < plan.peft.rank and not strategy.takes_ranks:
        raise SiteRefusal(
            "rank_above_limit",
            f"the plan's rank {plan.peft.rank} is above {adapted.config.rank}, the most that this site trains, and "
            f"strategy={plan.strategy.kind} cannot combine different ranks",
        )


def _own_training(plan: ClientPlan, file: SiteFile) -> LocalTraining:
    """Return what this site does of the plan: its own file may cap the steps, for everything that follows."""
    cap = file.runtime.steps_per_round
    return plan.local if cap is None else plan.local.model_copy(update={"steps": min(cap, plan.local.steps)})


def _local_round(
    instruction: Instruction,
    adapted: AdaptedModel,
    strategy: Strategy,
    training: LocalTraining,
    state: SiteState,
    memory: NamedTensors,
) -> tuple[LocalRound, NamedTensors]:
    """Return the strategy's half of the round, from what was sent, what follows from the public seed, and what this
    site kept; and the part of the adapter that was sent."""
    header = instruction.header
    plan, number = header.plan, header.round
    if adapted.base.digest != header.base_digest:
        raise SiteRefusal(
            "wrong_base",
            f"this site's base has digest {adapted.base.digest[:12]}, the server's {header.base_digest[:12]}; "
            "install the same model files",
        )
    initial = adapted.initial(plan.adapter_seed, plan.peft.rank)
    sent = strategy.downloaded(adapted.names, number)
    try:
        tensors = received(instruction, state.references(plan.run))
        own = {name: tensor for name, tensor in tensors.items() if name in adapted.names}
        extras = {name: tensor for name, tensor in tensors.items() if name not in adapted.names}
        verify(own, {name: shape for name, shape in layout_of(initial).items() if name in sent})
        strategy.client.verify_extras(extras, initial)
    except ReplyRejected as problem:
        raise SiteRefusal(problem.code, f"the adapter sent by the server is unusable: {problem}") from problem
    adapter = initial | own
    if digest(adapter | extras) != header.adapter_digest:
        raise SiteRefusal("adapter_digest", "the adapter does not match its digest; server and site differ in version")
    local = strategy.client.begin(
        LocalStart(
            adapter=adapter,
            extras=extras,
            memory=memory,
            trained=strategy.trained(adapted.names, number),
            uploaded=strategy.uploaded(adapted.names, number),
            local=training,
            learning_rate=training.optimizer.learning_rate * training.learning_rate_factor(number, plan.rounds),
        )
    )
    return local, own


def _privacy_plan(plan: ClientPlan, file: SiteFile, num_units: int) -> PrivacyPlan:
    asked = local_privacy(plan.privacy)
    try:
        return build_plan(
            asked,
            _own_training(plan, file),
            rounds=plan.rounds,
            published_units=_published_units(asked, file),
            num_units=num_units,
            site_delta=None if file.budget is None else file.budget.delta,
        )
    except PrivacyError as error:
        raise PrivacyError(f"site {file.name}: {error}") from error


def _published_units(asked: LocalPrivacy, file: SiteFile) -> int:
    """Return the public count of what is protected."""
    if not isinstance(asked, UserLevel):
        return file.published_records
    if file.published_users is None:
        raise PrivacyError(
            f"site {file.name}: user-level privacy needs published_users, a count of users to make public"
        )
    return file.published_users


def _released(trained: Trained, job: TrainingJob) -> dict[str, float]:
    """Return the metrics that leave: what is public, what was noised, and without privacy what the policy lets out."""
    metrics: dict[str, float] = {}
    protected = job.header.plan.privacy.kind != "none"
    if trained.noisy_loss is not None:
        metrics["noisy_training_loss"] = trained.noisy_loss
    policy = job.file.policy
    if not protected and policy is not None and policy.release_training_loss:
        metrics["training_loss"] = trained.diagnostics.mean_loss
    return releasable(metrics, protected=protected)


def _statement(privacy: PrivacyPlan, ledger: Ledger, plan: ClientPlan) -> PrivacyStatement:
    """Return what the site's protection costs so far."""
    asked = local_privacy(plan.privacy)
    insecure = not isinstance(asked, NoPrivacy) and asked.insecure_seed is not None
    account = ledger.account(plan.run)
    budget, admitted = account.budget.epsilon, account.admitted
    return PrivacyStatement(
        unit=privacy.unit,
        relation=privacy.relation,
        # The ledger admitted nothing above that, for any unit; disjoint data sets may add up to more.
        epsilon_run=min(account.run.epsilon, admitted),
        epsilon_total=min(account.total.epsilon, admitted),
        epsilon_budget=budget,
        delta=privacy.delta,
        accountant=privacy.accountant if account.run.rule == "schedule" else f"{RENYI}, as a filter",
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        sampling_rate=privacy.sampling.rate,
        steps_executed=account.steps,
        mechanism=privacy.mechanism(account.steps).to_json(),
        mechanisms=tuple(each.to_json() for each in account.mechanisms),
        insecure_seed=insecure,
    )


def _refusal(instruction: Instruction, work: RoundWork, code: str, why: Exception) -> Reply:
    """Return the refusal with its fixed sentence. The figures may depend on records, so they stay in the site's log."""
    _log.warning("site %s refuses with %s: %s", work.file.name, code, why)
    return Reply(
        ReplyHeader(
            status="refused",
            site=work.file.name,
            round=instruction.header.round,
            plan_digest=instruction.header.plan_digest,
            code=code,
            reason=sentence(code),
        )
    )
