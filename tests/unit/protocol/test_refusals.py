"""Every code has one fixed sentence and one thing to do, in the code and in the docs."""

import ast
import re
from pathlib import Path

import pytest

from protocol.refusals import REFUSALS, sentence

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(path for package in ("client", "protocol") for path in (ROOT / package).rglob("*.py"))


def raised_codes() -> set[str]:
    """The codes of every `SiteRefusal("code", ...)` in the source."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "SiteRefusal":
                code = node.args[0]
                found |= {code.value} if isinstance(code, ast.Constant) else set()
    return found


def test_every_code_that_is_raised_has_a_sentence() -> None:
    raised = raised_codes()
    assert len(raised) > 20
    assert raised <= REFUSALS.keys(), raised - REFUSALS.keys()


def test_the_docs_hold_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    table = {code: (told, fix) for code, told, fix in rows}
    for code, refusal in REFUSALS.items():
        assert table.get(code) == (refusal.told, refusal.fix), f"docs/errors.md, row {code}"


def test_the_docs_have_no_row_of_a_code_that_is_gone() -> None:
    section = (ROOT / "docs" / "errors.md").read_text().split("## What a site says")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == REFUSALS.keys()


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_a_sentence_is_fixed_text(code: str) -> None:
    told = REFUSALS[code].told
    assert "{" not in told
    assert not re.search(r"\d", told.replace("float32", ""))
    assert "|" not in told + REFUSALS[code].fix


def test_an_unknown_code_says_as_little_as_possible() -> None:
    assert sentence("patient_miller") == sentence("site_error")
