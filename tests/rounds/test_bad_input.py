"""What a person sees when the input is wrong: the value, the bound and the fix, before anything is trained."""

import json
import re
from pathlib import Path

import pytest

from conf.compose import compose_experiment
from protocol.errors import BudgetExceeded, CloisterError, ConfigError, DataError, ModelError, PrivacyError
from simulations.simulate import simulate

ROWS = [{"prompt": f"Visit {n}.", "completion": f" Plan {n % 7}.", "site": f"s{n % 3}"} for n in range(30)]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path: Path, *overrides: str) -> None:
    experiment = compose_experiment(["experiment=smoke", "federation.local.expected_batch_size=2", *overrides])
    try:
        simulate(experiment, tmp_path / "run")
    finally:
        assert not (tmp_path / "run" / "metrics.jsonl").exists(), "found before anything was trained"


def own_rows(path: Path) -> list[str]:
    return [f"data.source.path={path}", "data.split_column=null"]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.source.path=no/such.jsonl"], DataError, r"no/such\.jsonl"),
        (["model.path=./no-such-model"], ModelError, r"model\.path=\./no-such-model does not exist"),
        (["peft.rank=500"], ModelError, r"peft\.rank=500 is above the size of .*\(\d+ x \d+\); use at most \d+"),
        (["peft.targets=[q_prj]"], ModelError, r"no module of this model is named 'q_prj'; did you mean q_proj\?"),
        (["privacy.delta=0.01"], PrivacyError, r"δ=0\.01 \(privacy\.delta.*is not below 1/n="),
        (
            ["privacy.target_epsilon=null", "privacy.noise_multiplier=0.5", "federation.site_epsilon=0.001"],
            BudgetExceeded,
            r"a single step costs ε=.* above the site's whole budget of 0\.001",
        ),
        (["federation.cohort_size=9"], ConfigError, r"federation\.cohort_size=9 is larger than the population of 4"),
        (["federation.min_replies=9"], ConfigError, r"federation\.min_replies=9 is larger than the population of 4"),
        (["data.truncation=refuse", "data.max_length=20"], DataError, r"tokens are more than data\.max_length=20"),
        (["data.partition.sites=[harbour]"], DataError, r"harbour.*harbor"),
        (["data.partition.key=clinic"], DataError, r"clinic"),
        (["data.columns.prompt=promt"], DataError, r"promt.*prompt"),
    ],
)
def test_message(tmp_path: Path, overrides: list[str], error: type[CloisterError], message: str) -> None:
    with pytest.raises(error) as caught:
        run(tmp_path, *overrides)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_a_malformed_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    lines = path.read_text().splitlines()
    lines[4] = '{"prompt": "broken'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 5"):
        run(tmp_path, *own_rows(path))


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        run(tmp_path, *own_rows(tmp_path / "rows.jsonl"))


def test_more_sites_than_records_leaves_one_empty(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:3])
    with pytest.raises(DataError, match=r"sites"):
        run(tmp_path, *own_rows(path), "data.partition={kind:iid,sites:20}")


def test_a_label_outside_the_label_set(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "fine,good\nawful,bad\n" * 20 + "hm,neutral\n")
    with pytest.raises(DataError, match=r"'neutral' is not in task\.labels \(good, bad"):
        run(
            tmp_path,
            "data=csv_labelled",
            f"data.source.path={path}",
            "task=classification",
            "task.labels=[good,bad]",
            "data.partition={kind:iid,sites:1}",
        )


def test_a_run_directory_that_exists(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"already exists and is not empty; give another logging\.directory"):
        run(tmp_path)
    assert (tmp_path / "run" / "kept.txt").read_text() == "precious"


def test_a_layer_without_a_rule_is_named(tmp_path: Path) -> None:
    refusing = ("privacy.per_example_gradients=opacus", "privacy.without_rule=refuse")
    with pytest.raises(PrivacyError, match=r"no per-example gradient rule in opacus: .*embed_tokens.*one_by_one"):
        run(tmp_path, "peft.targets=[embed_tokens]", *refusing)
