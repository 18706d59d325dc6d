"""The commands as a person runs them: real processes, their output, and their exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLOISTER = Path(sys.executable).parent / "cloister"
QUICK = [
    "experiment=smoke",
    "federation.local.expected_batch_size=4",
    "evaluation.max_examples=20",
    "federation.rounds=1",
]


def cloister(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb"}
    return subprocess.run(
        [CLOISTER, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=1800
    )


def test_config_prints_the_experiment_its_digest_and_warnings(tmp_path: Path) -> None:
    result = cloister(tmp_path, "config", "privacy=none", "strategy=fedit")
    assert result.returncode == 0
    assert "kind: fedit" in result.stdout
    assert "digest " in result.stdout
    assert "warning privacy=none" in result.stdout


def test_config_as_json_can_be_read_back(tmp_path: Path) -> None:
    result = cloister(tmp_path, "config", "--json", "seed=3")
    assert json.loads(result.stdout)["seed"] == 3


def test_bad_configuration_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    result = cloister(tmp_path, "config", "federation.rouds=3", "peft.rank=0")
    assert result.returncode == 2
    assert "the configuration has 2 problem(s)" in result.stderr
    assert "did you mean rounds?" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "code"),
    [("data.source.path=none.jsonl", 3), ("peft.rank=900", 4), ("privacy.delta=0.5", 5)],
)
def test_exit_codes_sort_errors_by_what_to_do(tmp_path: Path, override: str, code: int) -> None:
    result = cloister(tmp_path, "simulate", *QUICK, override)
    assert result.returncode == code
    assert result.stderr.startswith("error ")
    assert "Traceback" not in result.stderr


def test_simulate_degrades_to_plain_lines_and_can_be_repeated(tmp_path: Path) -> None:
    result = cloister(tmp_path, "simulate", *QUICK, "privacy.insecure_seed=1", "logging.directory=first")
    assert result.returncode == 0, result.stderr
    assert "\x1b[" not in result.stdout
    assert "round 1 of 1: 4 replies" in result.stdout
    assert "perplexity on held-out records" in result.stdout
    assert "privacy.insecure_seed is set" in result.stdout
    again = cloister(tmp_path, "simulate", "--from", "first")
    assert again.returncode == 0, again.stderr
    (second,) = (tmp_path / "runs").iterdir()
    digests = [
        json.loads((run / "summary.json").read_text())["adapter"]["digest"] for run in (tmp_path / "first", second)
    ]
    assert digests[0] == digests[1]


def test_from_takes_no_overrides(tmp_path: Path) -> None:
    result = cloister(tmp_path, "simulate", "--from", "somewhere", "seed=1")
    assert result.returncode == 2
    assert "--from repeats a run as it was" in result.stderr


def test_from_needs_a_run_directory(tmp_path: Path) -> None:
    result = cloister(tmp_path, "simulate", "--from", "somewhere")
    assert result.returncode == 2
    assert "is no run directory: it has no config.json" in result.stderr


@pytest.mark.slow
@pytest.mark.rare
def test_a_sweep_ends_with_one_table(tmp_path: Path) -> None:
    result = cloister(tmp_path, "simulate", "-m", *QUICK, "strategy=fedit,ffa_lora", "seed=0,1")
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("sweep") :]
    for job in (
        "strategy=fedit seed=0",
        "strategy=fedit seed=1",
        "strategy=ffa_lora seed=0",
        "strategy=ffa_lora seed=1",
    ):
        assert job in " ".join(table.split())
    (sweep,) = (tmp_path / "runs").iterdir()
    assert len([run for run in sweep.iterdir() if (run / "summary.json").is_file()]) == 4


def test_a_sweep_is_checked_before_its_first_run(tmp_path: Path) -> None:
    result = cloister(tmp_path, "simulate", "-m", *QUICK, "peft.rank=4,0")
    assert result.returncode == 2
    assert "peft.rank=0" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.rare
def test_the_study_compares_all_baselines(tmp_path: Path) -> None:
    result = cloister(
        tmp_path, "study", "baselines", *QUICK, "logging.directory=study", "data.partition.sites=[harbor,eastfield]"
    )
    assert result.returncode == 0, result.stderr
    lines = json.loads((tmp_path / "study" / "baselines.json").read_text())
    assert [line["label"] for line in lines] == [
        "base, not fine-tuned",
        "eastfield alone, private",
        "harbor alone, private",
        "mean site alone",
        "federated, private",
        "federated, not private",
        "centralized, not private",
    ]
    assert all(set(line["groups"]) == {"eastfield", "harbor"} for line in lines if line["label"] != "mean site alone")
    assert lines[4]["epsilon"] <= 8
    assert lines[5]["epsilon"] is None
