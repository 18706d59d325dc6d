"""People in a simulation: counted, checked and grouped as a site does it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from client.site import Site
from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from conf.schema.privacy import UserLevel
from privacy.plan import build_plan
from protocol.errors import DataError
from protocol.instructions import client_plan
from simulations.patient import admit
from simulations.population import build_population

ALL_TRAINED = "data.split_column=side"
SPELLINGS = ["Ann", "ann", "ANN ", "Müller", "Mu\u0308ller", "Ben", "Cleo", "D"]


def written(folder: Path, people: Sequence[object], text: str = "a note of some words") -> Path:
    path = folder / "notes.jsonl"
    path.write_text("".join(json.dumps({"person": each, "text": text, "side": "train"}) + "\n" for each in people))
    return path


def overrides(path: Path, privacy: str = "user_level", *more: str) -> list[str]:
    return [
        "data=jsonl_text",
        f"data.source.path={path}",
        "data.user_column=person",
        "data.partition={kind: iid, sites: 1}",
        f"privacy={privacy}",
        "federation.rounds=1",
        "federation.local.steps=1",
        "federation.local.expected_batch_size=1",
        *more,
    ]


def experiment(path: Path, privacy: str = "user_level", *more: str) -> Experiment:
    return compose_experiment(overrides(path, privacy, *more))


def only_site(made: Experiment, state: Path) -> Site:
    (site,) = build_population(made).sites(made, state).values()
    return site


@pytest.mark.parametrize("hidden", [0, 3, 7])
def test_a_row_that_names_nobody_is_refused_wherever_the_split_puts_it(tmp_path: Path, hidden: int) -> None:
    people: list[object] = [*SPELLINGS[:hidden], None, *SPELLINGS[hidden:]]
    path = written(tmp_path, people)
    said = rf"notes\.jsonl, line {hidden + 1} has no value in data\.user_column='person'"
    for seed in range(5):
        with pytest.raises(DataError, match=said):
            build_population(compose_experiment([*overrides(path), f"seed={seed}"]))
    for command in (["plan"], ["data", "preview"]):
        found = CliRunner().invoke(app, [*command, *overrides(path)])
        assert isinstance(found.exception, DataError)
        assert f"line {hidden + 1} has no value" in str(found.exception)
    # Who asks for no protection of people may have records of nobody.
    assert only_site(experiment(path, "example_level"), tmp_path).file.published_users is not None


def test_a_site_counts_and_plans_by_people_and_tells_its_log_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = experiment(written(tmp_path, SPELLINGS * 3), "user_level", ALL_TRAINED)
    (rows,) = build_population(made).parts.values()
    site = only_site(made, tmp_path / "state")
    assert site.file.published_users == len({str(row["person"]).strip().lower()[:1] for row in rows}) == 5
    with caplog.at_level(logging.WARNING):
        site.rehearse(client_plan(made, "run"))
        site.rehearse(client_plan(made, "other"))
    told = [record.getMessage() for record in caplog.records if "spellings" in record.getMessage()]
    assert told == [told[0]]
    assert told[0].startswith("site site-1: data.user_column='person' names 5 people in 8 spellings: 3 differed")
    # The doctor compares sites that differ in one whole person.
    assert len(admit(made, {"site-1": rows}, tmp_path / "doctor").units) == 5


def test_a_site_refuses_nobody_also_where_nothing_would_be_learned(tmp_path: Path) -> None:
    made = experiment(written(tmp_path, SPELLINGS * 3))
    file = only_site(made, tmp_path / "state").file
    rows = [{"person": "Ann", "text": "some words"}, {"person": None, "text": ""}, {"person": "Ben", "text": "words"}]
    with pytest.raises(DataError, match="row 2 has no value"):
        Site(file, rows=lambda: rows, simulated=True).rehearse(client_plan(made, "run"))


def test_preview_tells_how_many_were_joined(tmp_path: Path) -> None:
    path = written(tmp_path, [*SPELLINGS * 3, None, None])
    shown = CliRunner().invoke(app, ["data", "preview", *overrides(path, "example_level"), "--examples", "0"])
    assert shown.exit_code == 0, shown.output
    assert "data.user_column='person' names 5 people in 8 spellings: 3 differed from another only in" in shown.output
    assert "rows that name nobody, which privacy=user_level refuses: " in shown.output


def test_published_counts_and_slots_are_those_of_people(tmp_path: Path) -> None:
    """Published as five, three people more than that would have had no slot."""
    made = experiment(written(tmp_path, SPELLINGS * 3), "user_level", ALL_TRAINED)
    site = only_site(made, tmp_path / "state")
    plan = site.rehearse(client_plan(made, "run"))
    assert plan.sampling.slots == site.file.published_users == 5
    assert isinstance(made.privacy, UserLevel)
    again = build_plan(made.privacy, made.federation.local, rounds=1, published_units=5, num_units=5)
    assert plan.noise_multiplier == pytest.approx(again.noise_multiplier)
