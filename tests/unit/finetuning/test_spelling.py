"""One spelling of a text, which is its own."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.spelling import canonical

_TRICKY = (
    "iIıİ\u0307\u0345\u00ad\u200b\u200d\u2011\u2019\u00b4\u1ffd\u0149\u2033\u3164\uff07\ufe31ßſσςΣ٣７\t \x00-'`e\u0301é"
)


@pytest.mark.parametrize(
    "other",
    [
        "anne-marie müller",
        "  Anne-Marie\tMüller ",
        "ANNE\u2011MARIE MU\u0308LLER",
        "Anne\u2010Marie\u00a0Müller",
        "Anne\u2013Marie\u2009\u202fMüller\n",
        "\ufeffAnne-Marie Mu\u200b\u0308ller",
        "An\u00adne-Ma\u200drie Müll\u2060er\u200e",
        "Ａｎｎｅ－Ｍａｒｉｅ　Ｍüｌｌｅｒ",
        "\x00Anne-Marie\x00Müller\x00",
        "𝐀nne-Marie Müller",
    ],
)
def test_what_looks_the_same_is_spelled_the_same(other: str) -> None:
    assert canonical(other) == "anne-marie müller"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("O'Brien", "O\u2019BRIEN"),
        ("O\u02bcBrien", "O\u00b4Brien"),
        ("Strauß", "STRAUSS"),
        ("Σωκράτης", "ΣΩΚΡΆΤΗΣ"),
        ("İnci", "inci"),
        ("IŞIK", "ışık"),
        ("ﬁona", "Fiona"),
        ("p-٧", "P-7"),
        ("क़", "क\u093c"),
    ],
)
def test_scripts_have_their_own_ways(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ann", "Anna"),
        ("José", "Jose"),
        ("Ann Lee", "AnnLee"),
        ("007", "7"),
        ("-7", "7"),
        ("A+", "A-"),
        ("किरण", "कुरण"),
    ],
)
def test_other_letters_are_another_text(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(_TRICKY)), max_size=8))
def test_a_spelling_is_its_own_and_that_of_every_normal_form(text: str) -> None:
    spelled = canonical(text)
    assert canonical(spelled) == spelled
    assert canonical(unicodedata.normalize("NFD", text)) == canonical(unicodedata.normalize("NFC", text)) == spelled
