"""No test passes or fails by how fast the machine is: waits watch what they wait for, and their bounds stop hangs."""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))
HANGS_S = 60
"""The least bound of a wait: what is bound to come is there by then, on a machine of any load that was seen."""
NOTHING = "# nothing may come meanwhile"
"""Marks a short wait for what must not come: slowness cannot fail it."""
WAITS = {"wait", "join", "result", "communicate", "settimeout", "get"}


def bounds(tree: ast.AST) -> list[tuple[int, float]]:
    """Return the line and the seconds of each literal bound of a wait."""
    found: list[tuple[int, float]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            values = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
            values += node.args[:1] if name in WAITS and isinstance(node.func, ast.Attribute) else []
        elif isinstance(node, ast.BinOp) and "monotonic()" in ast.unparse(node.left):
            values = [node.right]
        else:
            continue
        found += [
            (value.lineno, value.value)
            for value in values
            if isinstance(value, ast.Constant) and isinstance(value.value, (int, float))
        ]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_bound_stops_a_hang_and_measures_nothing(path: Path) -> None:
    source = (TESTS / path).read_text()
    lines = source.splitlines()
    short = [
        line for line, seconds in bounds(ast.parse(source)) if 0 < seconds < HANGS_S and NOTHING not in lines[line - 1]
    ]
    assert not short, [f"{line}: {lines[line - 1].strip()}" for line in short]


def test_a_short_bound_is_found() -> None:
    short = "process.wait(5)\nqueue.get(timeout=2)\nend = time.monotonic() + 8\nrun(x, timeout=10)\n"
    short += "','.join(names)\nd.get(k)"
    assert [seconds for _, seconds in bounds(ast.parse(short))] == [5, 2, 8, 10]


def test_hypothesis_has_no_deadline() -> None:
    profile = settings()
    assert profile.deadline is None
    assert HealthCheck.too_slow in profile.suppress_health_check
    for path in FILES:
        source = (TESTS / path).read_text()
        assert all(each == "None" for each in re.findall(r"\bdeadline=(\w+)", source)), path
        assert "too_slow" in source or "suppress_health_check" not in source, path
