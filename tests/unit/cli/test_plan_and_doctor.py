"""`cloister plan` and `cloister doctor` as a person or a script meets them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from conf.compose import compose_experiment
from privacy.doctor.diagnosis import CHECKS
from protocol.errors import ConfigError
from simulations.population import build_population

CHEAP = ("privacy.target_epsilon=null", "privacy.noise_multiplier=1", "federation.rounds=2")


def plan(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "120"})


def test_a_forecast_does_not_wait_for_torch() -> None:
    """It takes longer to import than all that `cloister plan` computes."""
    code = "import sys, cli.plan, privacy.forecast; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_the_tables_the_chart_and_the_figure(tmp_path: Path) -> None:
    figure = tmp_path / "plan.png"
    result = plan(*CHEAP, "--plot", str(figure))
    assert result.exit_code == 0, result.output
    for word in (
        "eastfield",
        "northgate",
        "█",
        "peft.rank=4",
        "what if",
        "3 runs on the same records",
        "one by one, at eastfield: 2",
    ):
        assert word in result.output
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_relation_stands_beside_the_figures() -> None:
    """Also where no batch is cut."""
    uncut = plan(*CHEAP, "privacy.batch_cap=null", "--records", "1000")
    assert "relation add or remove one record of a site, in one of its published slots" in uncut.output
    told = json.loads(plan(*CHEAP, "privacy.batch_cap=null", "--records", "1000", "--json").output)
    assert told["sites"][0]["relation"] == "add or remove one record of a site, in one of its published slots"


def test_given_counts_as_json() -> None:
    told = json.loads(plan(*CHEAP, "strategy=ffa_lora", "--records", "1000,2000", "--json").output)
    assert [site["published"] for site in told["sites"]] == [1000, 2000]
    assert told["sites"][0]["epsilon"] > told["sites"][1]["epsilon"] > 0
    assert told["feasible"] is True
    assert told["unit"] == "record"
    assert [line["records"] for line in told["group"]] == [2, 4, 8]
    assert told["group"][0]["epsilon"] > 2 * told["sites"][0]["epsilon"]
    assert told["search"][1]["runs"] == 10
    assert told["search"][1]["epsilon"] > told["search"][1]["epsilon_of_best"] > told["sites"][0]["epsilon"]
    assert told["trained_values"] == 53248


def test_users_are_drawn_from_their_own_published_count() -> None:
    """Of the simulated sites' patients, rounded up as a site publishes them; a person's records count as one."""
    experiment = compose_experiment(["privacy=user_level"])
    sites = build_population(experiment).sites(experiment, Path("never-written"))
    told = json.loads(plan("privacy=user_level", *CHEAP, "--json").output)
    assert {site["label"]: site["published"] for site in told["sites"]} == {
        name: site.file.published_users for name, site in sites.items()
    }
    assert told["unit"] == "user"
    assert told["group"] == []


def test_whole_sites_are_one_line_and_what_each_enforces_besides_follows() -> None:
    told = json.loads(plan("privacy=client_level_tree", "federation.cohort_size=2", "--json").output)
    assert [(site["label"], site["published"]) for site in told["sites"]] == [("federation", 4)]
    assert told["unit"] == "site"
    assert told["sites"][0]["epsilon"] <= 8
    assert told["search"] == told["group"] == told["what_if"] == []
    both = ("privacy=client_level", "privacy.local={kind: example_level, noise_multiplier: 1}", "--records", "1000")
    told = json.loads(plan(*both, "data.partition.sites=[harbor]", "privacy.delta=0.01", "--json").output)
    assert [site["label"] for site in told["sites"]] == ["federation", "site-1"]
    assert told["group"]


def test_without_privacy_it_says_so() -> None:
    result = plan("privacy=none")
    assert result.exit_code == 0
    assert "nothing is protected" in result.output
    told = json.loads(plan("privacy=none", "--json").output)
    assert {site["epsilon"] for site in told["sites"]} == {None}


def test_what_cannot_be_is_named_with_a_way_out() -> None:
    result = plan(*CHEAP, "privacy.delta=0.02", "--records", "50,1000")
    assert result.exit_code == 5
    assert "feasible with privacy.delta=null" in result.output


def test_a_site_smaller_than_the_batch_has_a_plan() -> None:
    told = json.loads(plan(*CHEAP, "--records", "50,1000", "--json").output)
    assert [site["sampling_rate"] for site in told["sites"]] == [1.0, 0.064]


def test_many_sites_are_told_by_a_few() -> None:
    counts = ",".join(str(1000 + 10 * n) for n in range(60))
    told = json.loads(plan(*CHEAP, "--records", counts, "--json").output)
    assert told["sites_in_all"] == 60
    assert len(told["sites"]) == 8
    assert [told["sites"][0]["published"], told["sites"][-1]["published"]] == [1000, 1590]


def test_counts_must_be_counts() -> None:
    for wrong in ("1000,many", "²", "9" * 5000, "0"):
        result = plan("--records", wrong)
        assert "give positive counts with commas" in str(result.exception)


def test_a_figure_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "x.xyz", "use one of .png"), (tmp_path / "no" / "x.png", "does not exist")):
        result = plan("--plot", str(path), "no.such=override")
        assert isinstance(result.exception, ConfigError)
        assert why in str(result.exception)


@pytest.mark.slow
def test_the_doctor_passes_a_run_without_privacy() -> None:
    result = CliRunner().invoke(app, ["doctor", "privacy=none", "experiment=smoke", "--json"])
    told = json.loads(result.output)
    assert (result.exit_code, told["exit_code"]) == (0, 0)
    assert [line["code"] for line in told["checks"]] == list(CHECKS)
    verdicts = {line["code"]: line["passed"] for line in told["checks"]}
    assert verdicts[10] is verdicts[11] is verdicts[12] is verdicts[17] is True
    assert verdicts[15] is verdicts[18] is verdicts[21] is None


@pytest.mark.slow
def test_the_doctor_says_what_it_does_not_examine() -> None:
    result = CliRunner().invoke(app, ["doctor", "privacy=client_level", "experiment=smoke"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "pass updates are clipped as a whole: norms of 4 updates at most 1.000000 x the clip norm" in result.output
    assert "9 of 9 checks passed for privacy=client_level" in result.output
    assert "not examined: the noise on the sum of updates, and its price, are the server's" in result.output
