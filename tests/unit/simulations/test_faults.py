"""Every line of the table of faults names a test that exists, and what the table says of it is what became of it."""

import ast
from pathlib import Path

import pytest

from simulations.faults import FAULTS, Fault, inject, print_faults

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.injected)
def test_a_test_shows_it(fault: Fault) -> None:
    path, name = fault.test.split("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({fault.injected for fault in FAULTS}) == len(FAULTS)
    outcomes = {fault.test: "survived" for fault in FAULTS}
    print_faults(outcomes)
    assert f"survived: {len(FAULTS)} of {len(FAULTS)}" in capsys.readouterr().out
    outcomes[FAULTS[0].test] = "NOT SURVIVED"
    lost = sum(fault.test == FAULTS[0].test for fault in FAULTS)
    print_faults(outcomes)
    assert f"survived: {len(FAULTS) - lost} of {len(FAULTS)}" in capsys.readouterr().out


TESTS = """
import pytest
@pytest.mark.parametrize("number", [1, 2])
def test_holds(number): pass
@pytest.mark.parametrize("number", [1, 2])
def test_holds_once(number): assert number == 1
@pytest.fixture
def broken(): raise OSError
def test_never_began(broken): pass
def test_not_here(): pytest.skip("no such disk")
"""


def test_a_fault_is_survived_when_its_whole_test_passes(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    names = ("test_holds", "test_holds_once", "test_never_began", "test_not_here")
    faults = [Fault(name, "", f"tests/test_it.py::{name}") for name in names]
    assert list(inject(faults, tmp_path).values()) == [
        "survived",
        "NOT SURVIVED",
        "NOT SURVIVED",
        "not injected: no such disk",
    ]
    assert set(inject(faults, tmp_path / "elsewhere").values()) == {"not injected: no tests here, or no pytest"}
