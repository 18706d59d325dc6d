"""Every row knows its file and line, through any splitting; every fault of a row is reported there."""

import copy
import json
from pathlib import Path

import pytest

from conf.schema.data import DataConfig, DataSource, LabelledColumns, PromptCompletionColumns
from finetuning.batches import TokenizedRows, tokenize_rows
from finetuning.datasets import read_rows, rows_in_use, split_rows
from finetuning.row_checks import first_fault
from finetuning.rows import Place, SourceRow, at_place, named, place_of
from protocol.errors import DataError
from tests.unit.finetuning.test_batches import tokenizer


def read(path: Path, text: str) -> list[str]:
    path.write_bytes(text.encode())
    return [str(place_of(row, 0)) for row in read_rows(DataSource(path=str(path)))]


def places(path: Path, unit: str, *numbers: int) -> list[str]:
    return [f"{path}, {unit} {number}" for number in numbers]


def test_a_csv_record_stands_at_the_line_on_which_it_starts(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    assert read(file, 'text\n"one\n\nand\n"\n\ntwo\r\n"three\n3"\nfour') == places(file, "line", 2, 7, 8, 10)
    assert read(file, '"te\nxt"\none\n') == places(file, "line", 3)


def test_blank_json_lines_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert read(file, '\n{"a": 1}\n\n  \n{"a": 2}\n') == places(file, "line", 2, 5)


def test_items_of_an_array_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read(file, '[{"a": 1},\n\n{"a": 2}]') == places(file, "item", 1, 2)


def test_each_file_of_a_folder_counts_for_itself(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n{"a": 2}\n')
    found = [str(place_of(row, 0)) for row in read_rows(DataSource(path=str(tmp_path)))]
    assert found == places(tmp_path / "a.jsonl", "line", 1, 2) + places(tmp_path / "b.jsonl", "line", 1, 2)


def test_a_row_keeps_its_place_when_split_copied() -> None:
    rows = [SourceRow({"n": at}, Place("a.csv", "line", at)) for at in range(50)]
    config = DataConfig.model_validate({"source": {"path": "x"}, "columns": {"kind": "text"}, "max_records": 30})
    for side in split_rows(rows, config, seed=4):
        assert [place_of(row, 0).number for row in side] == [row["n"] for row in side]
    for again in (copy.copy(rows[7]), copy.deepcopy(rows[7])):
        assert (again, place_of(again, 0)) == ({"n": 7}, Place("a.csv", "line", 7))
    assert str(place_of({"n": 1}, 3)) == "row 3"


def test_places_are_named_by_file_and_not_all() -> None:
    assert named([Place("a", "line", at) for at in range(12)]) == "lines 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 of a, ..."
    with pytest.raises(DataError, match=r"^a: wrong$"), at_place("a"):
        raise DataError("wrong")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", b"text\n" + b"x\n" * 5000 + b"\xff\n", 5002),
        ("a.csv", b"text\xff\nx\n", 1),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', 3),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', 2),
        ("a.csv", b'text\none\n"two\nand no end\n', 3),
        ("a.csv", b'text\n"o\nne"\n"two" x\n', 4),
        ("a.csv", b'text,b\n"o\nne",1\n"t\nwo"\n', 4),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n", 2),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(
    tmp_path: Path, name: str, content: bytes, line: int
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}, line {line}: not (UTF-8|valid)|line {line}: \d cells"):
        read_rows(DataSource(path=str(file)))


def test_no_second_line_number_confuses_a_json_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": 1\n')
    with pytest.raises(DataError) as caught:
        read_rows(DataSource(path=str(file)))
    assert str(caught.value).count("line 1") == 0
    assert "a.jsonl, line 2: not valid JSON" in str(caught.value)


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00", "\\ude00\\ud83d", "x\\uD83Dx"])
@pytest.mark.parametrize("row", ['{"a": "%s"}', '{"m": [{"content": "%s"}]}', '{"%s": 1}'])
def test_half_a_character_is_refused_at_its_line(tmp_path: Path, half: str, row: str) -> None:
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"a": "fine \\ud83d\\ude00"}\n\n' + row % half + "\n")
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 3: column .* holds half of a character \(\\u[d-e0-9a-f]{4}"
    ) as caught:
        read_rows(DataSource(path=str(lines)))
    str(caught.value).encode()  # the message itself can be shown
    array.write_text('[{"a": 1},\n' + row % half + "]")
    with pytest.raises(DataError, match=r"a\.json, item 2: column .* holds half of a character"):
        read_rows(DataSource(path=str(array)))


def test_whole_characters_and_escaped_backslashes_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}\n')
    assert read_rows(DataSource(path=str(file))) == [{"a": "\N{GRINNING FACE}", "b": "\\ud83d"}]


@pytest.mark.parametrize(
    ("name", "header", "shown"),
    [
        ("a.csv", "label;text", "';'"),
        ("a.csv", '"label";"text"', "';'"),
        ("a.csv", "\ufefflabel;text", "';'"),
        ("a.csv", "sep=;", "';'"),
        ("a.csv", "label\ttext", "a tab"),
        ("a.csv", "label|text", r"'\|'"),
        ("a.tsv", "label,text", "','"),
        ("a.tsv", "label;text", "';'"),
    ],
)
def test_another_separator_is_named(tmp_path: Path, name: str, header: str, shown: str) -> None:
    file = tmp_path / name
    file.write_text(f"{header}\nham;hello\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}, line 1: the separator is {shown}, but a .* save it with commas"):
        read_rows(DataSource(path=str(file)))


def test_one_column_and_separators_within_quotes_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text\n"a; b, c"\nd; e\n')
    assert [row["text"] for row in read_rows(DataSource(path=str(file)))] == ["a; b, c", "d; e"]
    file.write_text('text,"b;c"\n1;1,2\n')
    assert read_rows(DataSource(path=str(file))) == [{"text": "1;1", "b;c": "2"}]


def test_home_is_expanded_in_the_path_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_rows(DataSource(path="~/a.jsonl")) == [{"a": 1}]


def source_rows(*cells: dict[str, object]) -> list[SourceRow]:
    return [SourceRow(row, Place("a.jsonl", "line", 10 + at)) for at, row in enumerate(cells)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}],
            {},
            "^a.jsonl, line 11: column 'compl",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, "^a.jsonl, line 11: no column 'completion'"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcdefg"}],
            {"max_length": 5, "truncation": "refuse"},
            "^a.jsonl, line 11: 9 tokens are more",
        ),
        ([{"prompt": "a", "completion": ""}] * 2, {}, r"none of 2 rows .* \(lines 10, 11 of a\.jsonl\)$"),
    ],
)
def test_tokenizing_reports_the_place(rows: list[dict[str, object]], options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_rows(source_rows(*rows), PromptCompletionColumns(), tokenizer(), **{"max_length": None, **options})  # type: ignore[arg-type]


def test_rows_left_out_are_named_by_their_place_in_a_joined_report_too() -> None:
    rows = source_rows(*({"prompt": "a", "completion": text} for text in ("", "b", "c", "")))
    parts = [
        tokenize_rows(part, PromptCompletionColumns(), tokenizer(), max_length=None) for part in (rows[:2], rows[2:])
    ]
    joined = TokenizedRows.joined(parts)
    whole = tokenize_rows(rows, PromptCompletionColumns(), tokenizer(), max_length=None)
    assert joined.report == whole.report
    assert joined.report.emptied == (1, 4)
    assert joined.report.sentences()[-1].endswith(": lines 10, 13 of a.jsonl")
    assert len(joined.examples) == 2


def test_a_missing_split_value_is_reported_at_its_place() -> None:
    config = DataConfig.model_validate({"source": {"path": "x"}, "columns": {"kind": "text"}, "split_column": "split"})
    rows = source_rows({"split": "train"}, {"text": "a"})
    with pytest.raises(DataError, match=r"^a\.jsonl, line 11: no column 'split'"):
        split_rows(rows, config, seed=0)
    assert rows_in_use(source_rows({"split": "test"}, {"split": "heldout"}), config) == [{"split": "heldout"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "perhaps"}, "label 'perhaps' is not in"),
        ({"text": 1, "label": "no"}, "column 'text' holds a int"),
        ({"text": "a"}, "no column 'label'"),
        ({"label": "no"}, "no column 'text'"),
    ],
)
def test_the_first_fault_is_that_of_the_file(row: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"text": "a", "label": "yes"}
    rows = source_rows(good, good, row, good, {"text": 0, "label": 0})
    fault = first_fault(rows, LabelledColumns(), ("no", "yes"))
    assert fault is not None
    assert fault.row is rows[2]
    assert fault.sentence.startswith(f"a.jsonl, line 12: {message}")
    assert first_fault(rows[:2], LabelledColumns(), ("no", "yes")) is None


@pytest.mark.parametrize("messages", ["hello", [{"role": "usr", "content": "a"}], [{"role": "user"}], ["a"]])
def test_a_chat_is_checked_without_a_tokenizer(messages: object) -> None:
    columns = DataConfig.model_validate({"source": {"path": "x"}, "columns": {"kind": "chat"}}).columns
    assert first_fault(source_rows({"messages": [{"role": "user", "content": "a"}]}), columns, None) is None
    fault = first_fault(source_rows({"messages": messages}), columns, None)
    assert fault is not None
    assert fault.sentence.startswith("a.jsonl, line 10: message")


def test_rows_are_written_as_json_as_before() -> None:
    assert json.dumps(source_rows({"a": 1})) == '[{"a": 1}]'
