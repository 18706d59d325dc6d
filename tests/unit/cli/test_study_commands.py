"""The commands of studies: options that make no sense are refused with a hint, and a tiny study leaves its files."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from protocol.errors import ConfigError

TINY = (
    *("--sites", "2", "--rounds", "1", "--steps", "1", "--records", "8", "--workers", "1"),
    *("evaluation.max_examples=4", "data.max_records=300", "data.max_length=48"),
)


def test_a_tiny_study_of_bits_leaves_a_table_a_picture_and_a_text(tmp_path: Path) -> None:
    arguments = ["study", "bits", "--codecs", "none,eden:2", "--epsilons", "inf", *TINY, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 cells, 0 done before; about 0 minutes on 1 idle cores" in result.output
    assert "| codec | bits per value | no privacy |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 5000
    written = (tmp_path / "results.csv").read_bytes()

    again = CliRunner().invoke(app, arguments)
    assert "2 cells, 2 done before" in again.output
    assert (tmp_path / "results.csv").read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategies", "--strategies", "fedavg"], r"strategy 'fedavg' does not exist; choose among .*ffa_lora"),
        (["bits", "--codecs", "zip"], r"codec 'zip' does not exist; choose among .*eden"),
        (["ranks", "--ranks", "8,0"], r"ranks '8,0' must be positive integers"),
        (["strategies", "--sets", "mnist"], r"data set 'mnist' does not exist; choose among clinics"),
    ],
)
def test_a_wrong_name_says_which_are_right(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["study", *arguments], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--epsilons", "--sites", "--seeds", "--rates"])
def test_a_list_that_holds_no_numbers_is_refused(option: str) -> None:
    result = CliRunner().invoke(app, ["study", "strategies", option, "1,many"])
    assert result.exit_code == 2
    assert "holds something that is no number" in " ".join(result.output.split())


@pytest.mark.parametrize(("option", "value"), [("--sites", "2.5"), ("--sites", "0"), ("--seeds", "-1")])
def test_a_count_is_a_whole_number(option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["study", "strategies", option, value])
    assert result.exit_code == 2
    assert "whole numbers" in " ".join(result.output.split())


@pytest.mark.parametrize(("option", "value"), [("--epsilons", "8,-1"), ("--epsilons", "nan"), ("--rates", "0")])
def test_epsilon_and_rates_are_positive(option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["study", "strategies", option, value])
    assert result.exit_code == 2
    assert "must be above 0" in " ".join(result.output.split())
