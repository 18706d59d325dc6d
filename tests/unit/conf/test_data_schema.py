"""The data group: defaults, refusals, and every YAML of the group."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from conf.schema.data import DataConfig

GROUP = Path(__file__).parents[3] / "conf" / "data"
FILES = sorted(GROUP.glob("*.yaml"))


def config(**changes: object) -> DataConfig:
    return DataConfig.model_validate({"source": {"path": "rows.jsonl"}, "columns": {"kind": "text"}, **changes})


def test_the_group_is_not_empty() -> None:
    assert {"clinics", "csv_labelled", "hub", "jsonl_chat", "jsonl_instruction", "jsonl_text"} <= {
        file.stem for file in FILES
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_yaml_validates_and_says_what_it_is_for(file: Path) -> None:
    text = file.read_text()
    tree = yaml.safe_load(text)
    if tree["source"]["path"] == "???":
        tree["source"]["path"] = "given"
    assert text.startswith("# ")
    assert DataConfig.model_validate(tree).source.path


def test_the_default_trains_completions_of_the_embedded_clinics() -> None:
    clinics = DataConfig.model_validate(yaml.safe_load((GROUP / "clinics.yaml").read_text()))
    assert clinics.source.path == "embedded:clinics"
    assert (clinics.columns.kind, clinics.train_on, clinics.split_column) == (
        "prompt_completion",
        "completion",
        "split",
    )
    assert clinics.partition.kind == "natural_key"
    assert clinics.max_length == 128


def test_column_names_are_the_conventional_ones() -> None:
    assert config(columns={"kind": "instruction"}).columns.model_dump() == {
        "kind": "instruction",
        "instruction": "instruction",
        "input": "input",
        "response": "response",
    }


def test_a_value_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().max_length = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {}}, "Field required"),
        ({"source": {"path": "x", "format": "pickle"}}, "'jsonl', 'csv'"),
        ({"columns": {"kind": "table"}}, "'prompt_completion'"),
        ({"columns": {"kind": "text", "txt": "a"}}, "Extra inputs"),
        (
            {"columns": {"kind": "prompt_completion", "prompt": "a", "completion": "a"}},
            "prompt and completion both name the column 'a'; give each its own",
        ),
        ({"heldout_fraction": 1.0}, "less than 1"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"train_value": "a", "heldout_value": "a"}, "both 'a': held-out records would be trained on"),
        ({"partition": {"kind": "iid", "sites": 0}}, "greater than 0"),
        ({"partition": {"kind": "dirichlet", "sites": 2, "alpha": 0}}, "greater than 0"),
        ({"partition": {"kind": "size_skewed", "sites": 2, "ratio": 0.5}}, "greater than or equal to 1"),
        ({"partition": {"kind": "natural_key", "sites": ["a", "a"]}}, "sites must be distinct; repeated: a"),
        ({"partition": {"kind": "natural_key", "sites": []}}, "at least 1 item"),
    ],
)
def test_a_bad_value_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)
