"""The table in the documentation is what was caught. Last in this folder, because it needs the others."""

from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "mutations.md"
LEAST = 15
HEAD = """# Planted faults

Known ways to break a privacy guarantee. Each is planted into the real code while one test runs
(`tests/privacy/mutations`; production has no switch for any of them), two real rounds are run at a small site, and the
named check of `cloister doctor` must fail. A healthy program passes every check. The last column is the exit code of
`cloister doctor` for that check.

This file is written by `python -m pytest tests/privacy/mutations --write-table`, and compared by the same tests.

| Fault | What it does | Caught by | Exit code |
| --- | --- | --- | --- |
"""


def test_the_documented_table_is_what_was_caught(caught: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if len(caught) < LEAST:
        pytest.skip(f"only {len(caught)} faults were planted in this run; run the whole folder")
    lines = [
        f"| {each.fault} | {' '.join(each.what.split())} | {each.checks[0]} | {each.code} |" for each in caught.values()
    ]
    table = HEAD + "\n".join(lines) + "\n"
    if request.config.getoption("--write-table", default=False):
        DOCUMENT.write_text(table)
    assert DOCUMENT.read_text() == table, "run: python -m pytest tests/privacy/mutations --write-table"
