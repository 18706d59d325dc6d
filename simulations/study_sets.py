"""The data that studies run on: the embedded clinics, and public sets from a folder where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError

__all__ = ["EMBEDDED", "REAL_SETS", "DataSet", "chosen_sets"]


@dataclass(frozen=True)
class DataSet:
    """One data set: the overrides that make an experiment of it, the column that skews it, and its own sites."""

    name: str
    overrides: tuple[str, ...]
    label: str
    """Column whose values a Dirichlet partition spreads unevenly."""
    site: str
    """Column that names the site of a record in the split the data came with."""

    def partition(self, kind: str, sites: int) -> str:
        """Return the override for `iid`, `own` or `dirichlet:ALPHA`.

        Raises:
            ConfigError: another kind, or an alpha that is no number.
        """
        if kind == "iid":
            return f"data.partition={{kind:iid,sites:{sites}}}"
        if kind == "own":
            return f"data.partition={{kind:natural_key,key:{self.site}}}"
        name, _, alpha = kind.partition(":")
        if name == "dirichlet" and _is_positive(alpha):
            return f"data.partition={{kind:dirichlet,sites:{sites},alpha:{alpha},label:{self.label}}}"
        raise ConfigError(
            f"partition {kind!r} does not exist; choose iid, own, or dirichlet:ALPHA such as dirichlet:0.3"
        )


EMBEDDED = DataSet("clinics", ("data=clinics", "model=clinic_base", "data.max_length=80"), "topic", "site")


@dataclass(frozen=True)
class _Stored:
    """How a public set lies in a folder: NAME/normalized.jsonl, one object per line."""

    columns: str
    label: str
    site: str
    split: bool = False
    """Whether a column `split` says `train` or `test`."""
    labels: tuple[str, ...] = ()
    """Classes; none: text to continue."""

    def overrides(self, name: str, path: Path, model: str) -> tuple[str, ...]:
        """Return what makes an experiment of it."""
        task = ("task=classification", f"task.labels=[{','.join(self.labels)}]") if self.labels else ()
        split = ("data.split_column=split", "data.heldout_value=test") if self.split else ()
        return (
            "data=jsonl_text",
            f"data.columns={self.columns}",
            f"data.source.path={path}",
            "data.max_length=96",
            "data.max_records=6000",
            f"model={'encoder' if self.labels else 'causal_lm'}",
            f"model.path={model}",
            *split,
            *task,
        )


_DOMAINS = "auto_and_commute banking credit_cards home kitchen_and_dining meta oos small_talk travel utility work"
REAL_SETS = {
    "medquad": _Stored("{kind:instruction,instruction:instruction,input:null,response:response}", "qtype", "client"),
    "shakespeare_roles": _Stored("{kind:text,text:text}", "play", "play"),
    "sentiment_3sites": _Stored(
        "{kind:labelled,text:text,label:label}", "label", "client", True, ("negative", "positive")
    ),
    "clinc150": _Stored("{kind:labelled,text:text,label:client}", "client", "client", True, tuple(_DOMAINS.split())),
}
"""MedQuAD, eight of Shakespeare's plays, the UCI labelled sentences and the domains of CLINC150 (docs/studies.md)."""
_SMALL_MODEL = "stories260k"
"""A folder beside the sets with a small language model; without it the embedded one is used."""


def chosen_sets(names: str, folder: Path | None) -> tuple[list[DataSet], list[str]]:
    """Return the sets by name, and a reason for each that is left out.

    Args:
        names: comma-separated; `all` is the embedded one and every public one that the folder has.
        folder: with the public sets, each in a folder of its name.

    Raises:
        ConfigError: an unknown set.
    """
    known = [EMBEDDED.name, *REAL_SETS]
    wanted = known if names == "all" else names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"data set {unknown[0]!r} does not exist; choose among {', '.join(known)}, or all")
    found: list[DataSet] = []
    missing: list[str] = []
    for name in wanted:
        if name == EMBEDDED.name:
            found.append(EMBEDDED)
        elif folder is None:
            missing.append(f"{name} is left out: no folder of data is given (--data or CLOISTER_DATA)")
        elif not (path := folder / name / "normalized.jsonl").is_file():
            missing.append(f"{name} is left out: {path} does not exist")
        else:
            found.append(_real(name, path, folder / _SMALL_MODEL))
    return found, missing


def _real(name: str, path: Path, model: Path) -> DataSet:
    stored = REAL_SETS[name]
    small = str(model) if model.is_dir() and not stored.labels else "embedded:clinic-base"
    return DataSet(name, stored.overrides(name, path, small), stored.label, stored.site)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
