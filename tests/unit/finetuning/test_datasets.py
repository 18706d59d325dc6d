"""Reading and splitting rows: real files of every format, and every error a user can meet."""

import json
import os
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema.data import DataConfig, DataSource, InstructionColumns, TextColumns
from finetuning.datasets import cell, check_columns, nearest, read_rows, split_rows
from protocol.errors import DataError

ROWS = [{"text": "one", "n": 1}, {"text": "zwei ü", "n": 2}]


def source(path: Path | str, **changes: object) -> DataSource:
    return DataSource.model_validate({"path": str(path), **changes})


def config(**changes: object) -> DataConfig:
    return DataConfig.model_validate({"source": {"path": "x"}, "columns": {"kind": "text"}, **changes})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines_keep_their_types_and_order(tmp_path: Path) -> None:
    rows = [{"text": "2024-01-01", "deep": {"a": [1, None]}}, {"text": "NA", "extra": True}]
    file = write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_rows(source(file)) == rows


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    assert read_rows(source(write(tmp_path / "a.json", json.dumps(ROWS, indent=1)))) == ROWS


def test_csv_values_are_text_exactly_as_written(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'text,label\n"a, ""b""\nc",007\n\nNA,\n')
    assert read_rows(source(file)) == [{"text": 'a, "b"\nc', "label": "007"}, {"text": "NA", "label": ""}]


def test_tsv_is_separated_by_tabs_and_fields_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert read_rows(source(write(tmp_path / "a.tsv", f"text\tlabel\n{long}\tb\n"))) == [{"text": long, "label": "b"}]


def test_parquet_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert read_rows(source(tmp_path / "a.parquet")) == ROWS


def test_a_saved_dataset_is_read_and_its_folder_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    before = {item.name: item.stat().st_mtime_ns for item in folder.iterdir()}
    assert read_rows(source(folder)) == ROWS
    assert read_rows(source(next(folder.glob("*.arrow")))) == ROWS
    assert {item.name: item.stat().st_mtime_ns for item in folder.iterdir()} == before


def test_a_saved_dict_gives_the_split_that_was_asked_for(tmp_path: Path) -> None:
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert read_rows(source(tmp_path / "saved")) == ROWS
    with pytest.raises(
        DataError, match=r"no split 'trian'; present: train; did you mean 'train'\?; set data\.source\.spl"
    ):
        read_rows(source(tmp_path / "saved", split="trian"))


def test_reading_leaves_no_copy_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, data = tmp_path / "scratch", tmp_path / "data"
    scratch.mkdir()
    data.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    datasets.Dataset.from_list(ROWS).to_parquet(str(data / "a.parquet"))
    read_rows(source(data / "a.parquet"))
    assert os.listdir(scratch) == []
    assert os.listdir(data) == ["a.parquet"]


def test_a_folder_is_read_in_the_order_of_its_file_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", '{"text": "second"}')
    write(tmp_path / "a.jsonl", '{"text": "first"}')
    write(tmp_path / "README.md", "not data")
    assert [row["text"] for row in read_rows(source(tmp_path))] == ["first", "second"]


def test_embedded_clinics_are_read() -> None:
    assert {"site", "split", "prompt", "completion"} <= set(read_rows(source("embedded:clinics"))[0])


def test_an_unknown_embedded_name_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"embedded:clinix.*set data\.source\.path"):
        read_rows(source("embedded:clinix"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: not valid JSON .*one complete object per line"),
        ("a.jsonl", '{"a": 1}\n"text"\n', r"line 2: a str instead of an object; write \{"),
        ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, "line 2: nested too deeply"),
        ("a.json", '[{"a": 1},\n {"a": }]', r"a\.json, line 2: not valid JSON"),
        ("a.json", '[{"a": 1}, 3]', r"item 2: a int instead of an object"),
        ("a.jsonl", "", r"a\.jsonl is empty \(0 bytes\); give a file with at least one record"),
        ("a.jsonl", "\n\n", r"a\.jsonl holds no records"),
        ("a.csv", "text,label\n", r"a\.csv holds no records"),
        ("a.csv", "text,label\na,b\nc,d,e\n", r"a\.csv, line 3: 3 cells, but the header names 2 columns; quote"),
        ("a.csv", "text,label\na\n", r"line 2: 1 cells, but the header names 2 columns"),
        ("a.csv", 'text\n"a" b\n', r"a\.csv, line 2: not valid CSV .*double the quotes"),
        ("a.csv", "text,text\na,b\n", r"line 1: the header repeats 'text'; give each column its own name"),
        ("a.csv", "\na,b\n", r"line 1: there is no header"),
        ("a.parquet", "no parquet", r"a\.parquet: cannot be read as parquet \(.+\); write the file again"),
        (
            "a.txt",
            "text",
            r"a\.txt: extension '\.txt' is not known \(\.jsonl, .*set data\.source\.format to jsonl, csv",
        ),
        ("rows", "text", r"extension 'missing' is not known"),
    ],
)
def test_a_malformed_file_is_named_with_its_line_and_the_fix(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(source(write(tmp_path / name, content)))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_that_is_not_utf8_is_a_data_error(tmp_path: Path, name: str) -> None:
    start = {"a.jsonl": b'{"a": "', "a.json": b'[{"a": "', "a.csv": b"text\n"}[name]
    (tmp_path / name).write_bytes(start + "ü".encode("latin-1") + b'"}')
    with pytest.raises(DataError, match=r"not UTF-8 .*save the file as UTF-8"):
        read_rows(source(tmp_path / name))


def test_a_missing_file_names_its_neighbors(tmp_path: Path) -> None:
    write(tmp_path / "clinic.jsonl", "{}")
    with pytest.raises(
        DataError, match=r"clinics\.jsonl does not exist; .* holds clinic\.jsonl; set data\.source\.path"
    ):
        read_rows(source(tmp_path / "clinics.jsonl"))


def test_a_missing_file_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is empty; set data\.source\.path"):
        read_rows(source(tmp_path / "a.jsonl"))


def test_a_hub_id_is_never_downloaded_unless_asked_for() -> None:
    with pytest.raises(DataError, match=r"nor does its folder .*data\.source\.format=hub"):
        read_rows(source("nobody-here/no-such-set"))


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    with pytest.raises(DataError, match=r"a/b: cannot be read as hub dataset \(no network\); check data\.source\.path"):
        read_rows(source("a/b", format="hub"))


def test_a_hub_dataset_of_an_unusual_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.packaged_modules.pandas.pandas import Pandas

    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: object.__new__(Pandas))
    with pytest.raises(DataError, match=r"a/b is stored as pandas; only arrow, csv, json, parquet, text"):
        read_rows(source("a/b", format="hub"))


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data file; known extensions: \.jsonl"):
        read_rows(source(tmp_path))
    write(tmp_path / "a.csv", "text\na\n")
    with pytest.raises(DataError, match="holds no parquet file"):
        read_rows(source(tmp_path, format="parquet"))


def test_a_folder_of_mixed_formats_needs_a_choice(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\nfrom csv\n")
    write(tmp_path / "a.jsonl", '{"text": "from json"}')
    with pytest.raises(DataError, match=r"mixes csv, jsonl; set data\.source\.format"):
        read_rows(source(tmp_path))
    assert read_rows(source(tmp_path, format="csv")) == [{"text": "from csv"}]


def test_a_missing_column_names_the_nearest_and_the_setting() -> None:
    with pytest.raises(
        DataError, match=r"no column 'text'; present: txt, n; did you mean 'txt'\?; set data\.columns\.text=<column>"
    ):
        check_columns([{"txt": "a"}, {"n": 1}], TextColumns())
    with pytest.raises(DataError, match=r"data\.columns\.input=<column>; or null if the data has none"):
        check_columns([{"instruction": "a", "response": "b"}], InstructionColumns())
    with pytest.raises(DataError, match=r"no column 'x'; present: none; set data\.split_column=<column>"):
        cell({}, "x", "data.split_column")


def test_columns_may_be_spread_over_rows() -> None:
    check_columns([{"instruction": "a", "response": "b"}, {"input": "c"}], InstructionColumns())
    assert cell({"a": None}, "a", "data.columns.text") is None


def test_nearest_is_silent_when_nothing_is_similar() -> None:
    assert nearest("zebra", ["prompt"]) == ""


def test_the_split_column_decides() -> None:
    rows = [{"split": value} for value in ("train", "heldout", "test", "train")]
    train, heldout = split_rows(rows, config(split_column="split"), seed=0)
    assert train == [rows[0], rows[3]]
    assert heldout == [rows[1]]


def test_a_split_without_heldout_rows_is_fine_when_all_are_training() -> None:
    assert split_rows([{"split": "train"}], config(split_column="split"), seed=0) == ([{"split": "train"}], [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ("trian", "heldout"),
            r"no record has split='train'; values found: 'heldout', 'trian'; did you mean 'trian'\?",
        ),
        (
            ("train", "held-out"),
            r"no record has split='heldout'; .*set data\.heldout_value, or data\.split_column=null",
        ),
    ],
)
def test_a_split_value_that_never_occurs(values: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_rows([{"split": value} for value in values], config(split_column="split"), seed=0)


def test_a_missing_split_column_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"no column 'split'; present: text; set data\.split_column"):
        split_rows([{"text": "a"}], config(split_column="split"), seed=0)


@given(count=st.integers(2, 60), seed=st.integers(0, 2**32), fraction=st.floats(0.01, 0.99))
def test_a_split_loses_and_repeats_nothing(count: int, seed: int, fraction: float) -> None:
    rows = [{"n": number} for number in range(count)]
    train, heldout = split_rows(rows, config(heldout_fraction=fraction), seed)
    assert train
    assert heldout
    assert sorted(row["n"] for row in (*train, *heldout)) == list(range(count))
    assert (train, heldout) == split_rows(rows, config(heldout_fraction=fraction), seed)


def test_one_more_record_moves_nobody_else() -> None:
    rows = [{"n": number} for number in range(200)]
    train, heldout = split_rows(rows, config(), seed=3)
    longer_train, longer_heldout = split_rows([*rows, {"n": 200}], config(), seed=3)
    assert longer_train[: len(train)] == train
    assert longer_heldout[: len(heldout)] == heldout


@given(groups=st.lists(st.integers(0, 8), min_size=2, max_size=60), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("column", ["group_column", "user_column"])
def test_a_group_lies_on_one_side(column: str, groups: list[int], seed: int) -> None:
    rows = [
        {"n": number, "of": f" Talk {group}" if number % 2 else f"talk {group}"} for number, group in enumerate(groups)
    ]
    train, heldout = split_rows(rows, config(**{column: "of"}, heldout_fraction=0.4), seed)
    sides = [{str(row["of"]).strip().casefold() for row in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert sorted(row["n"] for row in (*train, *heldout)) == list(range(len(rows)))
    assert all(sides) == (len(set(groups)) > 1)


def test_a_group_keeps_its_side_whoever_else_is_there() -> None:
    rows = [{"n": number, "of": f"talk {number // 3}"} for number in range(300)]
    heldout = split_rows(rows, config(group_column="of"), seed=3)[1]
    fewer = split_rows(rows[30:], config(group_column="of"), seed=3)[1]
    assert fewer == [row for row in heldout if row["n"] >= 30]


def test_rows_that_name_no_group_are_split_one_by_one() -> None:
    rows = [{"n": number, "of": None} for number in range(200)]
    train, heldout = split_rows(rows, config(group_column="of"), seed=3)
    assert 5 <= len(heldout) <= 40
    assert len(train) + len(heldout) == 200


def test_a_group_column_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"no column 'talk'; present: talks; .*set data\.group_column"):
        split_rows([{"talks": "a"}, {"talks": "b"}], config(group_column="talk"), seed=0)


def test_max_records_draws_with_the_seed_and_keeps_the_order() -> None:
    rows = [{"n": number} for number in range(100)]
    train, heldout = split_rows(rows, config(max_records=10), seed=1)
    assert len(train) + len(heldout) == 10
    assert [row["n"] for row in train] == sorted(row["n"] for row in train)
    assert (train, heldout) != split_rows(rows, config(max_records=10), seed=2)


def test_a_single_record_is_trained_on() -> None:
    assert split_rows([{"n": 1}], config(heldout_fraction=0.99), seed=0) == ([{"n": 1}], [])
