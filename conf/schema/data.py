"""Where records come from, which columns mean what, and how a simulation spreads them over sites."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from conf.schema.base import Frozen

__all__ = [
    "ChatColumns",
    "Columns",
    "DataConfig",
    "DataSource",
    "DirichletPartition",
    "IidPartition",
    "InstructionColumns",
    "LabelledColumns",
    "NaturalKeyPartition",
    "Partition",
    "PromptCompletionColumns",
    "SizeSkewedPartition",
    "TextColumns",
]

Name = Annotated[str, Field(min_length=1)]
Sites = Annotated[int, Field(gt=0, le=1_000_000)]
Records = Annotated[int, Field(gt=0, le=1 << 40)]


class _DistinctColumns(Frozen):
    """One column cannot play two parts: a prompt used as its own completion would train on the wrong text."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        owner: dict[str, str] = {}
        for field, column in self:
            if field == "kind" or column is None:
                continue
            if column in owner:
                raise ValueError(
                    f"{owner[column]} and {field} both name the column {column!r}; give each its own column"
                )
            owner[column] = field
        return self


class TextColumns(_DistinctColumns):
    """Free text; every token is trained."""

    kind: Literal["text"] = "text"
    text: Name = "text"


class InstructionColumns(_DistinctColumns):
    """An instruction, an optional input, and the response to learn."""

    kind: Literal["instruction"] = "instruction"
    instruction: Name = "instruction"
    input: Name | None = Field(default="input", description="further context; null when the data has no such column")
    response: Name = "response"


class ChatColumns(_DistinctColumns):
    """A list of `{role, content}` messages; the assistant's turns are learned."""

    kind: Literal["chat"] = "chat"
    messages: Name = "messages"


class PromptCompletionColumns(_DistinctColumns):
    """A prompt and the completion to learn, used exactly as written."""

    kind: Literal["prompt_completion"] = "prompt_completion"
    prompt: Name = "prompt"
    completion: Name = "completion"


class LabelledColumns(_DistinctColumns):
    """A text and its class, for task=classification."""

    kind: Literal["labelled"] = "labelled"
    text: Name = "text"
    label: Name = Field(
        default="label",
        description="a name from task.labels; or, where none of them is a number, indices throughout (from 0)",
    )


Columns = Annotated[
    TextColumns | InstructionColumns | ChatColumns | PromptCompletionColumns | LabelledColumns,
    Field(discriminator="kind"),
]


class DataSource(Frozen):
    """Where the records are. Nothing is downloaded unless `format` is `hub`."""

    path: str = Field(
        min_length=1, description="a file, a folder (~ is home), embedded:NAME, or (format=hub) a dataset id"
    )
    format: Literal["auto", "jsonl", "csv", "parquet", "arrow", "hub"] = Field(
        default="auto", description="auto: from the file's extension; arrow: a folder written by Dataset.save_to_disk"
    )
    subset: str | None = Field(default=None, description="configuration name of a hub dataset")
    revision: str | None = Field(default=None, description="commit or tag of a hub dataset; pin it to repeat a run")
    split: Name = Field(default="train", description="split of a hub dataset or of a saved DatasetDict")


class _SitesByNumber(Frozen):
    sites: Sites

    @property
    def population(self) -> int | None:
        """The number of sites."""
        return self.sites


class NaturalKeyPartition(Frozen):
    """One site per value of a column: the split the data came with."""

    kind: Literal["natural_key"] = "natural_key"
    key: Name = Field(default="site", description="column that names the site of a record")
    sites: tuple[Name, ...] | None = Field(
        default=None, min_length=1, description="only these sites; null: all of them"
    )
    min_records: Records = Field(default=1, description="sites with fewer records do not take part")

    @staticmethod
    def site_of(value: object) -> str:
        """Return the site name of a key's value: letters, digits, `_`, `.` and `-`, at most 64 of them."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", str(value)).strip("-._")[:64] or "site"

    @field_validator("sites")
    @classmethod
    def _distinct(cls, sites: tuple[str, ...] | None) -> tuple[str, ...] | None:
        repeated = sorted({site for site in sites or () if (sites or ()).count(site) > 1})
        if repeated:
            raise ValueError(f"sites must be distinct; repeated: {', '.join(repeated)}")
        return sites

    @property
    def population(self) -> int | None:
        """The number of sites where the configuration alone fixes it."""
        return None if self.sites is None else len(self.sites)


class IidPartition(_SitesByNumber):
    """Records dealt at random: every site sees the same distribution."""

    kind: Literal["iid"] = "iid"


class DirichletPartition(_SitesByNumber):
    """Label skew: each label's share per site is drawn from a Dirichlet distribution (arXiv 1909.06335)."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(gt=0, le=1e9, description="concentration: 100 is nearly iid, 0.1 gives most sites few labels")
    label: Name = Field(default="label", description="column whose values are skewed")


class SizeSkewedPartition(_SitesByNumber):
    """Same distribution, unequal sizes: geometric from the largest site to the smallest."""

    kind: Literal["size_skewed"] = "size_skewed"
    ratio: float = Field(ge=1, le=1e9, description="records of the largest site over records of the smallest")


Partition = Annotated[
    NaturalKeyPartition | IidPartition | DirichletPartition | SizeSkewedPartition, Field(discriminator="kind")
]


class DataConfig(Frozen):
    """The data of one experiment: where it is, what its columns mean, how it is split and cut."""

    source: DataSource
    columns: Columns
    train_on: Literal["completion", "all"] = Field(
        default="completion", description="completion: prompts are read but not learned; all: every token is learned"
    )
    split_column: Name | None = Field(default=None, description="column that says which records are held out")
    train_value: Name = Field(default="train", description="value of split_column for training records")
    heldout_value: Name = Field(
        default="heldout", description="value of split_column for held-out records; other values are left out"
    )
    heldout_fraction: float = Field(
        default=0.1, ge=1e-6, lt=1, description="chance of a record to be held out, when split_column is null"
    )
    group_column: Name | None = Field(
        default=None,
        description="column whose equal values (conversations, documents, households) stay together, all trained on "
        "or all held out, when split_column is null; null: user_column, where that is set",
    )
    max_length: Annotated[int, Field(ge=2, le=1 << 30)] | None = Field(
        default=None, description="longest sequence in tokens; null: the model's context"
    )
    truncation: Literal["truncate", "refuse"] = Field(
        default="truncate",
        description="longer sequences: keep their start (counted and reported), or stop with an error",
    )
    special_tokens: Literal["text", "parsed"] = Field(
        default="text",
        description="what a string such as </s> inside a record is: text like any other (counted and reported), or "
        "parsed as the model's own special token, for records that were rendered by a chat template",
    )
    max_records: Records | None = Field(
        default=None, description="use at most this many records of the source, drawn with the seed; null: all"
    )
    user_column: Name | None = Field(
        default=None,
        description="column that names the person a record is about, however spelled; needed by user-level privacy",
    )
    partition: Partition = Field(
        default=IidPartition(sites=4),
        description="how a simulation spreads the records over sites; real sites ignore it",
    )

    @model_validator(mode="after")
    def _split_values_differ(self) -> Self:
        if self.train_value == self.heldout_value:
            raise ValueError(
                f"train_value and heldout_value are both {self.train_value!r}: held-out records would be trained on; "
                "give them different values"
            )
        return self
