"""One spelling for everything that a reader takes for the same text: for names of people, and for texts of records."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["canonical"]

# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt), which `NFKC_Casefold` removes too; and U+2800.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_HYPHEN = re.compile("[\u058a\u05be\u2010-\u2015\u2043\u2212\u2e3a\u2e3b]")
_APOSTROPHE = re.compile("[`\u02b9\u02bb-\u02bd\u2018\u2019\u201b\u2032]")
_ACUTE = re.compile("[\u00b4\u1ffd]")  # typed for an apostrophe; NFKC would make a blank of it
_DOTTED_I = re.compile("\u0131\u0307*|i\u0307+")
_OTHER_DIGIT = re.compile(r"[^\x00-\x7f\D]")


def canonical(text: str) -> str:
    """Return the one spelling of a text.

    It is Unicode's `NFKC_Casefold` (The Unicode Standard, section 3.13): composed and decomposed letters, full-width
    forms, ligatures, case, and characters that nobody sees are no difference. Beyond it, neither are the kind of a
    blank, of a hyphen, of an apostrophe, or of a digit, blanks at the ends, and the dot of an i, which depends on the
    language when a name is written in capitals. Accents and everything else stay. What is returned is its own spelling.

    >>> canonical("  Mu\u0308ller\u00a0 ANNE\u2011Marie")
    'müller anne-marie'
    """
    if not text.isascii():
        # Removed first: what stands around an invisible character may compose.
        text = _ACUTE.sub("'", _INVISIBLE.sub("", text))
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = _OTHER_DIGIT.sub(_ascii_digit, _HYPHEN.sub("-", _INVISIBLE.sub("", _DOTTED_I.sub("i", text))))
        text = unicodedata.normalize("NFKC", text)
    return " ".join(_CONTROL.sub(" ", _APOSTROPHE.sub("'", text.casefold())).split())


def _ascii_digit(digit: re.Match[str]) -> str:
    return str(unicodedata.decimal(digit[0]))
