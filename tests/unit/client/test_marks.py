"""The same records in another shape are known again; labels and templates merge nothing."""

import pytest

from client.marks import SHORTEST_TEXT, marks_of, normalized
from client.units import units_of
from conf.schema.data import ChatColumns, DataConfig, DataSource, InstructionColumns, LabelledColumns, TextColumns
from conf.schema.privacy import ExampleLevel, UserLevel
from privacy.identity import DataIdentity, identify

KEY = b"k" * 32
RECORDS = ExampleLevel(noise_multiplier=1.0)
NOTES = [f"On day {n} patient {n * n} reported no further pain and was sent home." for n in range(200)]


def identity(rows: list[dict[str, object]], columns: object, privacy: object = RECORDS) -> DataIdentity:
    data = DataConfig(source=DataSource(path="x.jsonl"), columns=columns, user_column="patient")  # type: ignore[arg-type]
    units = units_of(rows, privacy, data, KEY)  # type: ignore[arg-type]
    return identify(units.names, KEY, units.marks)


def texts(notes: list[str]) -> DataIdentity:
    return identity([{"text": note} for note in notes], TextColumns())


PLAIN = texts(NOTES)


def test_the_same_texts_with_a_label_are_the_same_records() -> None:
    labelled = identity([{"body": note, "label": "yes"} for note in NOTES], LabelledColumns(text="body"))
    assert PLAIN.units.isdisjoint(labelled.units)
    assert PLAIN.overlaps(labelled)


@pytest.mark.parametrize(
    "edited",
    [str.upper, lambda note: f"  {note}\n", lambda note: note.replace(" ", "\u00a0\n"), lambda note: f"“{note[:-1]}!”"],
    ids=["case", "ends", "spacing", "punctuation"],
)
def test_case_spacing_and_punctuation_make_no_new_record(edited: object) -> None:
    assert PLAIN.overlaps(texts([edited(note) for note in NOTES]))  # type: ignore[operator]


def test_a_conversation_shares_its_messages_with_an_instruction() -> None:
    asked = identity(
        [{"instruction": "Shorten this.", "input": note, "response": "Well."} for note in NOTES], InstructionColumns()
    )
    said = [{"role": "user", "content": note} for note in NOTES]
    chat = identity([{"messages": [turn, {"role": "assistant", "content": "Well."}]} for turn in said], ChatColumns())
    assert asked.overlaps(chat)
    assert chat.overlaps(PLAIN)


def test_half_of_the_rows_is_an_overlap_and_none_is_not() -> None:
    assert texts(NOTES[:100]).overlaps(texts(NOTES[50:150]))
    assert not texts(NOTES[:100]).overlaps(texts(NOTES[100:]))


def test_labels_merge_nothing() -> None:
    def rows(notes: list[str]) -> list[dict[str, object]]:
        return [{"text": note, "label": ("yes", "no")[n % 2]} for n, note in enumerate(notes)]

    assert not identity(rows(NOTES[:100]), LabelledColumns()).overlaps(identity(rows(NOTES[100:]), LabelledColumns()))


def test_a_template_merges_nothing_and_a_text_repeated_a_few_times_does() -> None:
    def rows(notes: list[str], template: str) -> list[dict[str, object]]:
        return [{"instruction": template, "input": note, "response": "ok"} for note in notes]

    template = "Summarize the following note of a patient in one short sentence:"
    first, second = rows(NOTES[:100], template), rows(NOTES[100:], template)
    assert not identity(first, InstructionColumns()).overlaps(identity(second, InstructionColumns()))
    assert identity(first[:8], InstructionColumns()).overlaps(identity(second[:8], InstructionColumns()))
    assert not identity(first[:9], InstructionColumns()).overlaps(identity(second[:9], InstructionColumns()))


def test_a_short_text_is_known_only_as_a_whole_record() -> None:
    short, long = "a" * (SHORTEST_TEXT - 1), "a" * SHORTEST_TEXT
    for text, known in ((short, False), (long, True)):
        plain = identity([{"text": text}], TextColumns())
        assert plain.overlaps(identity([{"text": text, "label": 1}], LabelledColumns())) is known
        assert plain.overlaps(texts([text.upper() + "."]))


def test_records_without_a_word_share_nothing() -> None:
    assert marks_of([{"text": "..."}, {"text": ""}, {"text": None}]) == frozenset()


def test_persons_need_no_marks() -> None:
    rows: list[dict[str, object]] = [{"text": note, "patient": str(n % 9)} for n, note in enumerate(NOTES)]
    users = identity(rows, TextColumns(), UserLevel(noise_multiplier=1.0, max_records_per_user=50))
    assert users.marks == frozenset()
    assert users == identify([str(n).encode() for n in range(9)], KEY)


def test_normalized() -> None:
    assert normalized("  Straße\u00a0– ﬁne,\tN°5_a ") == "strasse fine n 5 a"
    assert normalized("e\u0301") == normalized("É")
    assert normalized("!?") == ""


def test_names_and_texts_are_spelled_by_one_function() -> None:
    """What joins two names joins two texts: characters that nobody sees make no new record."""
    hidden = [note.replace("patient", "pa\u200bti\u00adent").replace(" ", "\u202f", 1) for note in NOTES]
    assert PLAIN.overlaps(texts(hidden))
    assert normalized("Ann\u2011Marie O\u2019Brien ７") == normalized("ann-marie o'brien 7")
