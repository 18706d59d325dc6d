"""The names that a file gives to its classes, in whatever order it numbers them."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from conf.schema.data import DataSource, LabelledColumns
from finetuning.batches import tokenize_rows
from finetuning.datasets import read_rows
from finetuning.rows import Row, place_of
from protocol.errors import DataError
from tests.unit.finetuning.test_batches import tokenizer

ROWS: list[dict[str, Any]] = [{"text": "bad film", "label": 0}, {"text": "good film", "label": 1}]


def named(names: list[str], rows: list[dict[str, Any]] = ROWS) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list(rows, features=features)


def written(data: datasets.Dataset, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DataSource:
    if kind == "parquet":
        data.to_parquet(str(folder / "a.parquet"))
        return DataSource(path=str(folder / "a.parquet"))
    if kind == "hub":
        from datasets.packaged_modules.parquet.parquet import Parquet

        data.to_parquet(str(folder / "a.parquet"))
        builder = Parquet(data_files={"train": str(folder / "a.parquet")}, cache_dir=str(folder / "cache"))
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: builder)
        return DataSource(path="somebody/set", format="hub")
    saved = datasets.DatasetDict({"train": data}) if kind == "dict" else data
    saved.save_to_disk(str(folder / "saved"))
    path = next((folder / "saved").glob("*.arrow")) if kind == "arrow" else folder / "saved"
    return DataSource(path=str(path))


def classes(rows: list[Row], labels: tuple[str, ...]) -> list[int | None]:
    tokenized = tokenize_rows(rows, LabelledColumns(), tokenizer(), max_length=None, labels=labels)
    return [example.label for example in tokenized.examples]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder", "dict", "hub"])
def test_a_class_is_known_by_the_name_in_the_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(written(named(["negative", "positive"]), kind, tmp_path, monkeypatch))
    assert [row["label"] for row in rows] == ["negative", "positive"]
    assert classes(rows, ("positive", "negative")) == [1, 0]
    assert classes(rows, ("negative", "positive")) == [0, 1]
    with pytest.raises(DataError, match=r"row 1: label 'negative', the name that the file itself gives to the class"):
        classes(rows, ("bad", "good"))


def test_each_file_of_a_folder_has_an_order_of_its_own(tmp_path: Path) -> None:
    named(["negative", "positive"]).to_parquet(str(tmp_path / "a.parquet"))
    named(["positive", "negative"]).to_parquet(str(tmp_path / "b.parquet"))
    rows = read_rows(DataSource(path=str(tmp_path)))
    assert classes(rows, ("positive", "negative")) == [1, 0, 0, 1]
    assert [str(place_of(row, 0)) for row in rows[1:3]] == [
        f"{tmp_path / 'a.parquet'}, row 2",
        f"{tmp_path / 'b.parquet'}, row 1",
    ]


def test_names_that_are_numbers_are_not_taken_for_indices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(written(named(["1", "2"]), "parquet", tmp_path, monkeypatch))
    assert classes(rows, ("2", "1")) == [1, 0]
    with pytest.raises(DataError, match="label '1', the name that the file itself"):
        classes(rows, ("one", "two", "three"))


def test_classes_without_names_of_their_own_stay_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(written(named(["0", "1"]), "parquet", tmp_path, monkeypatch))
    assert classes(rows, ("bad", "good")) == [0, 1]
    assert classes(rows, ("1", "0")) == [1, 0]


@pytest.mark.parametrize("label", [None, -1])
def test_a_record_without_a_class_has_no_label(
    label: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(
        written(named(["a", "b"], [*ROWS, {"text": "c", "label": label}]), "parquet", tmp_path, monkeypatch)
    )
    assert rows[2]["label"] is None
    with pytest.raises(DataError, match=r"a\.parquet, row 3: label None \(missing\)"):
        classes(rows, ("a", "b"))


def test_classes_within_lists_and_structs_are_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    role, text = datasets.ClassLabel(names=["user", "assistant"]), datasets.Value("string")
    features = datasets.Features(
        {
            "messages": datasets.List({"role": role, "content": text}),
            "meta": {"site": datasets.ClassLabel(names=["north", "south"]), "n": datasets.Value("int64")},
            "tags": datasets.LargeList(datasets.List(role)),
            "plain": datasets.List(datasets.Value("int64")),
        }
    )
    cells = {
        "messages": [{"role": 0, "content": "q"}, {"role": 1, "content": "a"}],
        "meta": {"site": 1, "n": 0},
        "tags": [[1], []],
        "plain": [0, 1],
    }
    empty: dict[str, Any] = {"messages": None, "meta": None, "tags": None, "plain": None}
    data = datasets.Dataset.from_list([cells, empty], features=features)
    assert read_rows(written(data, "folder", tmp_path, monkeypatch))[0] == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "meta": {"site": "south", "n": 0},
        "tags": [["assistant"], []],
        "plain": [0, 1],
    }


def test_a_class_beyond_the_names_is_refused_at_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuning.typed_files import _with_names

    rows: list[dict[str, object]] = [{"label": 0}, {"label": 2}]
    with pytest.raises(
        DataError, match=r"^a, row 2, column 'label': class 2 has no name: the file itself names 0 to 1"
    ):
        _with_names(rows, datasets.Features({"label": datasets.ClassLabel(names=["x", "y"])}), "a")


def test_a_class_can_be_the_text_to_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conf.schema.data import PromptCompletionColumns

    rows = read_rows(written(named(["negative", "positive"]), "parquet", tmp_path, monkeypatch))
    columns = PromptCompletionColumns(prompt="text", completion="label")
    example = tokenize_rows(rows, columns, tokenizer(), max_length=None).examples[0]
    assert tokenizer().decode(example.input_ids[example.trained][:-1].tolist()) == "negative"
