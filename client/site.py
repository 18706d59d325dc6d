"""A site: data, model, ledger and policy behind one door, `handle`.

Everything that touches the data is installed by the organization. What comes from a server is data (JSON and tensors),
never code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from client.rounds import RoundWork, SiteRecords, answer, rehearse
from client.site_file import read_site_file
from client.state import SiteState
from client.units import Units, units_of
from conf.schema.privacy import LocalPrivacy, UserLevel
from conf.schema.site import SiteFile
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import Example, TokenizedRows, tokenize_as_configured
from finetuning.datasets import read_rows, split_rows
from finetuning.memory import examples_that_fit, rank_that_fits
from finetuning.models import load_base
from finetuning.padding import LONGEST_TRIED
from finetuning.people import People, people_of
from finetuning.rows import Row, at_place
from finetuning.tokenization_report import TokenizationReport
from finetuning.vocabulary import check_fits
from privacy.plan import PrivacyPlan
from protocol.cards import SiteCard
from protocol.errors import DataError, SiteRefusal
from protocol.instructions import ClientPlan, Instruction, Reply

__all__ = ["Site", "kept_rows", "open_site", "read_site_file", "tokenize_site"]

_log = logging.getLogger(__name__)


class Site:
    """One organization's end of the federation."""

    def __init__(
        self, file: SiteFile, rows: Callable[[], Sequence[Row]] | None = None, *, simulated: bool = False
    ) -> None:
        """Open a site.

        Args:
            file: the site's own configuration.
            rows: where the training records come from, when it is not `file.data.source`.
            simulated: allows repeatable noise; no site file can say so.
        """
        self.file = file
        self._read = rows or self.read_records
        self._simulated = simulated
        self._tokenized: tuple[TokenizedRows, Sequence[Row]] | None = None
        self._people: People | None = None
        self._units: dict[tuple[LocalPrivacy, bytes], Units] = {}
        self._summaries: dict[Hashable, Sequence[Example]] = {}
        if file.runtime.threads is not None:
            torch.set_num_threads(file.runtime.threads)

    @cached_property
    def state(self) -> SiteState:
        """The site's files, created when first needed."""
        return SiteState(self.file)

    @cached_property
    def trained_rank(self) -> int | None:
        """The most LoRA rank that this site trains, by its file or by its memory; 0 where nothing fits, None: any.

        Raises:
            ModelError: the memory is limited, and the base is not there to say what an adapter of it takes.
        """
        most, memory = self.file.trained_rank, self._memory
        if memory is None:
            return most
        fitting = rank_that_fits(self.file.model_path, self.file.task, memory)
        return fitting if most is None else min(most, fitting)

    def card(self, challenge: bytes = b"") -> SiteCard:
        """Return what the site says of itself, signed. Where not even rank 1 fits it says 1, and refuses all rounds."""
        file, rank, key = self.file, self.trained_rank, self.state.signing_key
        card = SiteCard(
            cloister_version=version("cloister"),
            site=file.name,
            published_records=file.published_records,
            trained_rank=None if rank is None else max(rank, 1),
            key=key.verifying.to_hex(),
        )
        return card.model_copy(update={"signature": key.sign(card.statement(challenge)).hex()})

    def handle(self, instruction: Instruction) -> Reply:
        """Return the answer to an instruction: an update, or a refusal with its reason."""
        return answer(instruction, self.work())

    def rehearse(self, plan: ClientPlan) -> PrivacyPlan:
        """Check a plan against this site's data, model and budget; spends nothing, trains nothing.

        Raises:
            CloisterError: naming what does not fit.
        """
        return rehearse(plan, self.work())

    @property
    def tokenization(self) -> TokenizationReport | None:
        """What became of this site's rows, for the site alone; None before they were needed."""
        return None if self._tokenized is None else self._tokenized[0].report

    def work(self) -> RoundWork:
        """Return what this site brings to a round; `answer` and `rehearse` of `client.rounds` take it."""
        return RoundWork(self.file, lambda: self.state, self._adapted, self._records, self._simulated)

    def close(self) -> None:
        """Release the site's files."""
        if "state" in self.__dict__:
            self.state.close()

    def read_records(self) -> Sequence[Row]:
        """Return the records of `data.source`; only a split column keeps some of them out of training."""
        data = self.file.data
        with at_place(f"site {self.file.name}"):
            rows = read_rows(data.source)
            if data.split_column is None:
                return rows
            return split_rows(rows, data, seed=0)[0]

    def _adapted(self, plan: ClientPlan) -> AdaptedModel:
        # The site's own copy, whatever the plan calls the base: a server must not make a site read or download things.
        model = plan.model.model_copy(update={"path": self.file.model_path, "revision": None})
        base = load_base(model, self.file.task, self.file.runtime.device)
        rank = plan.strategy.rank_within(plan.peft.rank, self.trained_rank)
        if rank == 0:
            limits = f"trained_rank={self.file.trained_rank} and memory_mib={self.file.memory_mib}"
            raise SiteRefusal("rank_above_limit", f"not even a part of the plan fits {limits}")
        whole = plan.peft.rank
        cores = plan.strategy.cores_at(rank, whole)
        adapted = attach(base, plan.peft.at_rank(rank), self.file.task, cores, plan_rank=whole)
        if self._memory is not None:
            # A plan may put LoRA on more than the linear layers that the rank was chosen for.
            values = sum(parameter.numel() for parameter in adapted.parameters.values())
            if examples_that_fit(values, values, self._memory) == 0:
                raise SiteRefusal(
                    "rank_above_limit",
                    f"the plan's adapter has {values} values at rank {rank}, too many for memory_mib="
                    f"{self.file.memory_mib}",
                )
        return adapted

    @property
    def _memory(self) -> int | None:
        """Bytes."""
        return None if self.file.memory_mib is None else self.file.memory_mib << 20

    def _records(self, adapted: AdaptedModel, privacy: LocalPrivacy, key: bytes) -> SiteRecords:
        if self._tokenized is None:
            rows = self._read()
            self._tokenized = tokenize_site(self.file, rows, adapted), rows
            self._say(self._tokenized[0].report)
        tokenized, rows = self._tokenized
        asked = (privacy, key)
        if asked not in self._units:
            self._check_people(rows, privacy)
            with at_place(f"site {self.file.name}"):
                self._units = {asked: units_of(kept_rows(rows, tokenized), privacy, self.file.data, key)}
        return SiteRecords(tokenized.examples, self._units[asked], self._summaries)

    def _say(self, report: TokenizationReport) -> None:
        """Tell this site's own log what became of its rows; none of it is in any reply."""
        # A simulation has it in its summary, for all sites together.
        level = logging.WARNING if report.has_incidents and not self._simulated else logging.INFO
        for sentence in report.sentences():
            _log.log(level, "site %s: %s", self.file.name, sentence)

    def _check_people(self, rows: Sequence[Row], privacy: LocalPrivacy) -> None:
        """Refuse a row that names nobody, also one with nothing to learn; tell the operator, once, who was joined."""
        column = self.file.data.user_column
        if not isinstance(privacy, UserLevel) or column is None or self._people is not None:
            return
        with at_place(f"site {self.file.name}"):
            self._people = people_of(rows, column)
        if self._people.joined:
            _log.warning("site %s: %s", self.file.name, self._people.sentence(column))


def kept_rows(rows: Sequence[Row], tokenized: TokenizedRows) -> list[Row]:
    """Return the rows that became examples, one for each."""
    emptied = frozenset(tokenized.report.emptied)
    return [row for number, row in enumerate(rows, start=1) if number not in emptied]


def tokenize_site(file: SiteFile, rows: Sequence[Row], adapted: AdaptedModel) -> TokenizedRows:
    """Return the site's records as examples.

    Raises:
        DataError: naming the site: no record, none with anything to learn, or one that does not fit its description.
        ModelError: one that does not fit the model.
    """
    if not rows:
        raise DataError(
            f"site {file.name} has no training record; check data.source, data.split_column and the partition"
        )
    base = adapted.base
    with at_place(f"site {file.name}"):
        tokenized = tokenize_as_configured(
            rows, file.data, base.tokenizer, context=base.context, labels=file.task.labels
        )
    _check_tried(file, tokenized)
    check_fits(base, tokenized.examples, None if file.task.labels is None else len(file.task.labels))
    return tokenized


def _check_tried(file: SiteFile, tokenized: TokenizedRows) -> None:
    longest = max(len(example) for example in tokenized.examples)
    if file.data.max_length is None and longest > LONGEST_TRIED:
        raise DataError(
            f"site {file.name}: a record has {longest} tokens; more than {LONGEST_TRIED} must be asked for, because a "
            f"network is tried at that length before anything is booked: set data.max_length={longest}, or less to "
            "cut longer records"
        )


def open_site(path: Path) -> Site:
    """Return the site that a site file describes.

    Raises:
        ConfigError: the file is missing or invalid.
    """
    return Site(read_site_file(path))
