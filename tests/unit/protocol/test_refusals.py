"""Every code has one fixed sentence and one thing to do, in the code and in the docs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import SiteRefusal
from protocol.refusals import REFUSALS, REJECTIONS, sentence

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("cli", "client", "finetuning", "privacy", "protocol", "server", "simulations", "strategies")
CODE = re.compile(r"[a-z]+(_[a-z]+)*")


def calls(name: str, *packages: str) -> Iterator[ast.Call]:
    """Every call of a function or class in the source of some packages."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
                    yield node


def literals(arguments: list[ast.expr]) -> set[str]:
    """The codes among a call's arguments."""
    values = [each.value for each in arguments if isinstance(each, ast.Constant)]
    return {value for value in values if isinstance(value, str) and CODE.fullmatch(value)}


def raised(name: str, *packages: str) -> set[str]:
    """The codes that exceptions of a class are raised with, where the source names them."""
    return {code for call in calls(name, *packages) for code in literals(call.args[:1])}


def section(title: str) -> str:
    """A section of docs/errors.md."""
    return (ROOT / "docs" / "errors.md").read_text().split(f"## {title}")[1].split("\n## ")[0]


def test_every_code_that_is_raised_has_a_sentence() -> None:
    found = raised("SiteRefusal", *PACKAGES)
    assert len(found) > 20
    assert found <= REFUSALS.keys(), found - REFUSALS.keys()


def test_a_code_that_the_source_does_not_name_has_a_sentence_too() -> None:
    """`SiteRefusal(problem.code, ...)`: whatever is found in a reply, a site can find in what it is sent."""
    with pytest.raises(ValueError, match=r"'patient_miller' is no code of protocol/refusals\.py"):
        SiteRefusal("patient_miller", "")
    found = raised("ReplyRejected", "protocol", "strategies")
    assert found >= {"malformed_payload", "wrong_shape"}
    of_replies_alone = {"malformed_reply", "malformed_card", "wrong_metric", "no_loss"}
    assert found - REFUSALS.keys() == of_replies_alone


def test_every_code_that_a_server_finds_is_registered_and_documented() -> None:
    found = raised("ReplyRejected", *PACKAGES)
    found |= {code for call in calls("not_used", "server") for code in literals(call.args)}
    composed = {
        part.values[0].value  # type: ignore[attr-defined]
        for call in calls("ReplyRejected", *PACKAGES)
        for part in call.args[:1]
        if isinstance(part, ast.JoinedStr)
    }
    assert composed == {"wrong_"}
    assert found <= REJECTIONS, found - REJECTIONS
    assert all(code.startswith("wrong_") or code == "refused" for code in REJECTIONS - found), "none is gone"
    rows = re.findall(r"^\| (`.*?`) \|", section("What a server finds in a reply"), re.MULTILINE)
    assert {code for row in rows for code in re.findall(r"`(\w+)`", row)} == REJECTIONS


def test_the_docs_hold_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", section("What a site says"), re.MULTILINE)
    table = {code: (told, fix) for code, told, fix in rows}
    for code, refusal in REFUSALS.items():
        assert table.get(code) == (refusal.told, refusal.fix), f"docs/errors.md, row {code}"


def test_the_docs_have_no_row_of_a_code_that_is_gone() -> None:
    assert set(re.findall(r"^\| `(\w+)`", section("What a site says"), re.MULTILINE)) == REFUSALS.keys()


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_a_sentence_is_fixed_text(code: str) -> None:
    told = REFUSALS[code].told
    assert "{" not in told
    assert not re.search(r"\d", told.replace("float32", ""))
    assert "|" not in told + REFUSALS[code].fix


def test_an_unknown_code_says_as_little_as_possible() -> None:
    assert sentence("patient_miller") == sentence("site_error")
