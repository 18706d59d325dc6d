"""A faulty record is named by file and line, whatever the seed, the split and the partition make of the data."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from protocol.errors import DataError
from simulations.population import build_population
from simulations.simulate import rehearse_all

LABELLED = ("data=csv_labelled", "task=classification", "task.labels=[ham,spam]", "model=encoder", "model.path=x")
PARTITIONS = (
    "{kind:iid,sites:3}",
    "{kind:size_skewed,sites:2,ratio:3}",
    "{kind:dirichlet,sites:2,alpha:5.0,label:label}",
    "{kind:natural_key,key:site}",
)


@cache  # composing takes longer than all that is asked here
def composed(*overrides: str) -> Experiment:
    return compose_experiment(["data.source.path=x", *overrides])


def at(path: Path, *overrides: str, seed: int = 0, **changes: object) -> Experiment:
    experiment = composed(*overrides)
    source = experiment.data.source.model_copy(update={"path": str(path)})
    data = experiment.data.model_copy(update={"source": source, **changes})
    return experiment.model_copy(update={"data": data, "seed": seed})


def message(experiment: Experiment) -> str:
    with pytest.raises(DataError) as caught:
        build_population(experiment)
    return str(caught.value)


def csv(path: Path, faulty: Sequence[str] = (), count: int = 60) -> Path:
    lines = [f'{("ham", "spam")[at % 2]},"note\n{at}",{"north" if at % 3 else "south"},u{at}' for at in range(count)]
    lines[50:50] = faulty
    path.write_text("\n".join(["label,text,site,user", *lines, ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("label", ["-1", "", "hamm", "1"])
def test_the_line_is_the_same_for_every_seed_and_partition(tmp_path: Path, partition: str, label: str) -> None:
    """50 records of two lines each, and the header, stand before it. A second fault is never the one that is named."""
    path = csv(tmp_path / "notes.csv", [f"{label},one line,north,a", "eggs,another,south,b"])
    sites = {"site north: "} if "natural" in partition else {f"site site-{number}: " for number in (1, 2, 3)}
    owners: set[str] = set()
    for seed in range(6):
        for changes in ({"heldout_fraction": 0.5}, {"max_records": 12}):
            text = message(at(path, *LABELLED, f"data.partition={partition}", seed=seed, **changes))
            owner, _, sentence = text.partition(str(path))
            assert sentence.startswith(f", line 102: label '{label}' ")
            assert owner in {*sites, "held-out records: ", *([""] if "max_records" in changes else [])}
            owners.add(owner)
    assert owners >= {"held-out records: ", ""}
    assert owners & sites


def test_a_fault_in_rows_that_nobody_could_use_is_none(tmp_path: Path) -> None:
    path = csv(tmp_path / "notes.csv", ["-1,public test set,test,a"])
    split = ("data.split_column=site", "data.train_value=north", "data.heldout_value=south")
    named = "data.partition={kind:natural_key,key:site,sites:[north]}"
    assert build_population(at(path, *LABELLED, *split)).parts
    assert set(build_population(at(path, *LABELLED, named)).parts) == {"north"}


@pytest.mark.parametrize("partition", PARTITIONS[:2])
def test_names_and_indices_at_different_sites_are_a_mixture_all_the_same(tmp_path: Path, partition: str) -> None:
    path = csv(tmp_path / "notes.csv", ["0,one line,north,a"])
    text = message(at(path, *LABELLED, f"data.partition={partition}"))
    assert "line 102: label '0' is an index of task.labels, and 'ham' at " in text


def test_the_separator_and_the_columns_come_before_the_number_of_records(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("label;text\nham;hello\n")
    assert "the separator is ';'" in message(at(path, *LABELLED))
    path.write_text("label,txt\nham,hello\n")
    assert "no column 'text'; present: label, txt; did you mean 'txt'?" in message(at(path, *LABELLED))


@pytest.mark.parametrize("site", ["", None])
def test_a_row_without_a_site_is_named(tmp_path: Path, site: str | None) -> None:
    path = tmp_path / "notes.jsonl"
    last = '{"text": "b", "site": ""}' if site == "" else '{"text": "b"}'
    path.write_text('{"text": "a", "site": "n"}\n' * 9 + "\n" + last + "\n")
    partition = "data.partition={kind:natural_key,key:site}"
    experiments = (at(path, "data=jsonl_text", partition, seed=seed, heldout_fraction=0.01) for seed in (0, 3))
    texts = set(map(message, experiments))
    assert len(texts) == 1
    assert "notes.jsonl, line 11: " in texts.pop()


def test_a_site_with_nothing_to_learn_is_named(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "p {at}", "completion": "c", "site": "a"}}' for at in range(30)]
    lines += ['{"prompt": "x", "completion": "", "site": "lake"}'] * 6
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(lines))
    overrides = ("data=jsonl_prompt_completion", "data.partition={kind:natural_key,key:site}")
    experiment = at(path, *overrides, "federation.local.expected_batch_size=2", seed=1)
    sites = build_population(experiment).sites(experiment, tmp_path / "state")
    with pytest.raises(
        DataError, match=r"^site lake: none of \d rows has anything to learn.* \(lines 3\d.* of .*notes\.jsonl\)"
    ):
        rehearse_all(experiment, "run", list(sites.values()))
