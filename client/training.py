"""A round's training at a site: the records, the randomness and the plan come together here."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import MappingProxyType

from client.dry_run import way_of_gradients
from client.row_check import Computed, RowCheck, losses_and_gradients
from client.units import Units
from conf.schema.federation import LocalTraining
from conf.schema.privacy import LocalPrivacy, NoPrivacy, UserLevel, local_privacy
from conf.schema.site import SiteFile, SiteRuntime
from conf.schema.task import Classification, Task
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example
from finetuning.loop import TrainingDiagnostics, train_locally
from finetuning.memory import examples_that_fit
from finetuning.padding import LONGEST_TRIED
from finetuning.summaries import reads_summaries, summaries_of, summarized
from finetuning.tasks.build import build_objective
from finetuning.tokenizing import sequence_bound
from privacy.example_level import NativeGradients, OpacusGradients
from privacy.gradients import GradientRule, gradient_rule
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream, inputs_digest, round_stream
from protocol.instructions import InstructionHeader
from protocol.tensors import NamedTensors, digest
from strategies.base import LocalRound

__all__ = ["Trained", "TrainingJob", "check_gradients", "longest_record", "round_rule", "train"]


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, from where, on what, and how it is protected."""

    file: SiteFile
    header: InstructionHeader
    adapted: AdaptedModel
    trained_names: frozenset[str]
    local: LocalRound
    examples: Sequence[Example]
    units: Units
    privacy: PrivacyPlan
    memory: NamedTensors = field(default_factory=lambda: MappingProxyType({}))
    """What the site kept, and the local round was made with."""
    own_training: LocalTraining | None = None
    """Where the site's own file asks for less than the plan."""
    summaries: dict[Hashable, Sequence[Example]] = field(default_factory=lambda: dict[Hashable, Sequence[Example]]())
    """The site's records as a frozen encoder summarizes them: made in its first round, and kept for the others."""

    @property
    def training(self) -> LocalTraining:
        """Steps and optimizer of this round."""
        return self.own_training or self.header.plan.local

    @property
    def asked(self) -> LocalPrivacy:
        """The configuration of the protection that this site enforces itself."""
        return local_privacy(self.header.plan.privacy)

    def inputs(self, secret: bytes) -> str:
        """Return a digest (hex) of everything that the result depends on, whatever the run is called.

        It is stored in the ledger, which auditors export: without the site's secret nobody can test a guess of the
        records against it.
        """
        return hmac.digest(secret, self._plain_inputs.encode(), "sha256").hex()

    @cached_property
    def _plain_inputs(self) -> str:
        settings = self.header.plan.model_copy(update={"run": "any"}).digest
        records = _fingerprint(self.examples, self.units)
        header, privacy = self.header, repr(self.privacy)
        start, kept = digest(self.local.start), digest(self.memory)  # which `adapter_digest` does not cover
        return inputs_digest(
            self.file.name, settings, privacy, header.adapter_digest, start, kept, header.base_digest, records
        )

    def stream(self, secret: bytes, attempt: int) -> SecureStream:
        """Return the randomness of sampling, noise and dropout: keyed by the site's secret, unless it is repeatable.

        It is bound to every input. The same inputs give the same stream, so that a replay tells nothing new; other
        inputs give an independent one, or the difference of two results would be free of noise. Without privacy there
        is nothing to hide, and a run is repeatable.
        """
        plan, round_number = self.header.plan, self.header.round
        seed = plan.adapter_seed if isinstance(self.asked, NoPrivacy) else self.asked.insecure_seed
        if seed is not None:
            return SecureStream.insecure(seed, round_number, self._plain_inputs, attempt)
        return round_stream(
            secret, run=plan.run, round_number=round_number, inputs_digest=self.inputs(secret), attempt=attempt
        )


@dataclass(frozen=True)
class Trained:
    """What training gave. Only the update and the noisy loss are made to leave."""

    update: NamedTensors
    memory: NamedTensors
    """What the strategy keeps at this site for its next round."""
    noisy_loss: float | None
    diagnostics: TrainingDiagnostics
    clipped: int
    non_finite: int

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that may leave."""
        return hashlib.sha256(f"{digest(self.update)}|{self.noisy_loss!r}".encode()).hexdigest()

    @property
    def private_facts(self) -> dict[str, float]:
        """What only the site's own operator may see."""
        return {**asdict(self.diagnostics), "clipped": self.clipped, "non_finite": self.non_finite}


def train(job: TrainingJob, stream: SecureStream) -> Trained:
    """Return the update of one round, trained minus received; the network is left holding the trained adapter."""
    plan, asked = job.header.plan, job.asked
    runtime = job.file.runtime
    longest = longest_record(job.adapted, job.file)
    rule = round_rule(job.privacy, asked, job.adapted, job.trained_names, plan.task, runtime, stream, longest)
    try:
        job.adapted.load(job.local.start)
        diagnostics = train_locally(
            job.adapted,
            job.adapted.train_only(job.trained_names),
            _examples(job, rule),
            build_objective(plan.task),
            rule,
            job.training,
            units=job.units.members,
            unit_weighting=asked.user_gradient if isinstance(asked, UserLevel) else "sum",
            seed=_dropout_seed(stream),
            micro_batch_tokens=runtime.micro_batch_tokens,
            max_units=_most_units(job),
            static_shapes=runtime.static_shapes,
            longest=longest,
            most_records=asked.max_records_per_user if isinstance(asked, UserLevel) else 1,
            alike=_check_of_training(job, rule),
            gradient_checkpointing=runtime.gradient_checkpointing,
            learning_rate_factor=job.training.learning_rate_factor(job.header.round, plan.rounds),
            correct=job.local.correct,
        )
    finally:
        rule.close()
    outcome = job.local.finish(job.adapted.extract())
    return Trained(outcome.update, outcome.memory, rule.released_loss, diagnostics, rule.clipped, rule.non_finite)


def check_gradients(
    privacy: PrivacyPlan,
    asked: LocalPrivacy,
    adapted: AdaptedModel,
    trained_names: frozenset[str],
    task: Task,
    runtime: SiteRuntime,
    longest: int,
) -> None:
    """Refuse what cannot be trained under a plan, before anything is spent.

    Raises:
        PrivacyError: naming the first layer without a per-example rule, or a layer that couples examples.
        ModelError: the network fails on made-up examples.
    """
    stream = SecureStream.from_operating_system()
    round_rule(privacy, asked, adapted, trained_names, task, runtime, stream, longest).close()


def round_rule(
    privacy: PrivacyPlan,
    asked: LocalPrivacy,
    adapted: AdaptedModel,
    trained_names: frozenset[str],
    task: Task,
    runtime: SiteRuntime,
    stream: SecureStream,
    longest: int,
) -> GradientRule:
    """Return the gradient rule of a round: the plan's, whose per-example gradients a dry run found to be exact.

    Raises:
        PrivacyError: as `client.dry_run.way_of_gradients` and `privacy.gradients.gradient_rule` do.
        ModelError: the network fails on made-up examples.
    """
    trained = adapted.train_only(trained_names)
    if isinstance(asked, NoPrivacy):
        return gradient_rule(privacy, "native", adapted.network, trained, stream, without_rule="one_by_one")
    objective, classes = build_objective(task), _classes(task)
    way = way_of_gradients(privacy, asked, adapted, trained, objective, runtime, classes, longest)
    return gradient_rule(privacy, way, adapted.network, trained, stream, without_rule=asked.without_rule)


def longest_record(adapted: AdaptedModel, file: SiteFile) -> int:
    """Return the public bound on a record's tokens: the site's file's, or the model's up to what is tried unasked.

    Raises:
        DataError: the site's file asks for more than the model takes.
    """
    base, asked = adapted.base, file.data.max_length
    bound = sequence_bound(asked, base.tokenizer, base.context)
    return asked or min(bound or LONGEST_TRIED, LONGEST_TRIED)


def _examples(job: TrainingJob, rule: GradientRule) -> Sequence[Example]:
    """Return the site's records as training reads them: summarized where only a head on summaries is trained."""
    adapted, runtime = job.adapted, job.file.runtime
    if not reads_summaries(adapted):
        return job.examples
    base = adapted.base
    key = (base.digest, str(base.network.dtype), type(rule), runtime.static_shapes)
    if key not in job.summaries:
        job.summaries[key] = summarized(
            adapted,
            job.examples,
            micro_batch_tokens=runtime.micro_batch_tokens,
            max_rows=rule.max_micro_batch,
            longest=longest_record(adapted, job.file),
            static_shapes=runtime.static_shapes,
            alike=_row_check(job, rule, lambda batch, _: [summaries_of(adapted, batch)], "summaries", reads=False),
        )
    return job.summaries[key]


def _check_of_training(job: TrainingJob, rule: GradientRule) -> RowCheck | None:
    if not isinstance(rule, NativeGradients | OpacusGradients):
        return None
    computed = losses_and_gradients(job.adapted, build_objective(job.header.plan.task), rule.per_unit)
    return _row_check(job, rule, computed, "training", reads=reads_summaries(job.adapted))


def _row_check(job: TrainingJob, rule: GradientRule, computed: Computed, what: str, *, reads: bool) -> RowCheck | None:
    """Return what tells which batches are computed row by row alike; None where each unit is alone anyway.

    `reads`: the computation reads summaries in place of tokens.
    """
    if not isinstance(rule, NativeGradients | OpacusGradients):
        return None
    runtime, task = job.file.runtime, job.header.plan.task
    return RowCheck(
        adapted=job.adapted,
        computed=computed,
        classes=_classes(task),
        static=runtime.static_shapes,
        longest=longest_record(job.adapted, job.file),
        key=(what, type(rule), job.trained_names, runtime.gradient_checkpointing, runtime.static_shapes, task),
        summaries=reads,
    )


def _classes(task: Task) -> int | None:
    return len(task.labels) if isinstance(task, Classification) else None


def _most_units(job: TrainingJob) -> int | None:
    """Return how many units' gradients fit into the site's memory at once, a unit having as many records as the plan
    allows; None where the site sets no limit.
    """
    if job.file.memory_mib is None or not job.privacy.is_private:
        return None
    sizes = {name: parameter.numel() for name, parameter in job.adapted.parameters.items()}
    trained = sum(sizes[name] for name in job.trained_names)
    records = job.asked.max_records_per_user if isinstance(job.asked, UserLevel) else 1
    return max(1, examples_that_fit(sum(sizes.values()), trained, job.file.memory_mib << 20) // records)


def _fingerprint(examples: Sequence[Example], units: Units) -> str:
    """Return the SHA-256 (hex) of a site's tokenized records, in the order in which they can be drawn."""
    state, read = hashlib.sha256(), list(examples)
    for members in units.members:
        state.update(f"|{len(members)}|".encode())
        for position in members:
            example = read[position]
            state.update(f"|{len(example)}|{example.label}|".encode())
            state.update(example.input_ids.tobytes() + example.trained.tobytes())
    return state.hexdigest()


def _dropout_seed(stream: SecureStream) -> int:
    """Return a seed that nobody knows.

    Which mask a record meets depends on the others in its batch. Secret masks are independent of each other whatever
    was drawn, so the sensitivity bound holds for each of them; with a public seed it would not.
    """
    return int(stream.uniform(1)[0] * 2**53)
