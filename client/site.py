"""A site: data, model, ledger and policy behind one door, `handle`.

Everything that touches the data is installed by the organization. What comes from a server is data (JSON and tensors),
never code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from client.rounds import RoundWork, SiteRecords, answer, rehearse
from client.site_file import read_site_file
from client.state import SiteState
from client.units import Units, units_of
from conf.schema.privacy import LocalPrivacy
from conf.schema.site import SiteFile
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import TokenizedRows, tokenize_rows
from finetuning.datasets import read_rows, split_rows
from finetuning.memory import examples_that_fit, rank_that_fits
from finetuning.models import load_base
from finetuning.rows import Row, at_place
from privacy.plan import PrivacyPlan
from protocol.cards import SiteCard
from protocol.errors import DataError, SiteRefusal
from protocol.instructions import ClientPlan, Instruction, Reply

__all__ = ["Site", "open_site", "read_site_file"]


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
        self._units: dict[tuple[LocalPrivacy, bytes], Units] = {}
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
        adapted = attach(base, plan.peft.at_rank(rank), self.file.task, plan.strategy.cores_at(rank, plan.peft.rank))
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
            tokenized = tokenize_site(self.file, rows, adapted)
            emptied = set(tokenized.report.emptied)
            self._tokenized = tokenized, [row for number, row in enumerate(rows, start=1) if number not in emptied]
        tokenized, kept = self._tokenized
        asked = (privacy, key)
        if asked not in self._units:
            with at_place(f"site {self.file.name}"):
                self._units = {asked: units_of(kept, privacy, self.file.data, key)}
        return SiteRecords(tokenized.examples, self._units[asked])


def tokenize_site(file: SiteFile, rows: Sequence[Row], adapted: AdaptedModel) -> TokenizedRows:
    """Return the site's records as examples.

    Raises:
        DataError: naming the site: no record, none with anything to learn, or one that does not fit its description.
    """
    if not rows:
        raise DataError(
            f"site {file.name} has no training record; check data.source, data.split_column and the partition"
        )
    context, wanted = adapted.base.context, file.data.max_length
    if context is not None and wanted is not None and wanted > context:
        raise DataError(
            f"data.max_length={wanted} is above the model's context of {context} tokens; use at most {context}"
        )
    with at_place(f"site {file.name}"):
        return tokenize_rows(
            rows,
            file.data.columns,
            adapted.base.tokenizer,
            max_length=wanted or context,
            train_on=file.data.train_on,
            truncation=file.data.truncation,
            labels=file.task.labels,
        )


def open_site(path: Path) -> Site:
    """Return the site that a site file describes.

    Raises:
        ConfigError: the file is missing or invalid.
    """
    return Site(read_site_file(path))
