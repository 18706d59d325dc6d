"""Every line of the table of faults names a test that exists."""

import ast
from pathlib import Path

import pytest

from simulations.faults import FAULTS, Fault, print_faults

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.injected)
def test_a_test_shows_it(fault: Fault) -> None:
    path, name = fault.test.split("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({fault.injected for fault in FAULTS}) == len(FAULTS)
    print_faults()
    assert capsys.readouterr().out.count("test_") >= len(FAULTS)
