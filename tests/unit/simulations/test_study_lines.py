"""A study's file: what was written comes back, nothing is lost in a crash, and nothing is taken for another study's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigError
from simulations.study_lines import LineFile, work_through


@dataclass(frozen=True)
class Fruit:
    name: str
    count: int
    weight: float
    price: float | None


@dataclass(frozen=True)
class Other:
    name: str


APPLE, PLUM = Fruit("apple, green", 3, 0.1, None), Fruit('plum "x"\n', -1, float("inf"), 2.5)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


def test_lines_come_back_in_order_and_with_their_types(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "deep" / "lines.csv", Fruit)
    assert file.read() == []
    file.append(APPLE)
    file.append(PLUM)
    assert file.read() == [APPLE, PLUM]
    assert file.path.read_text().startswith("name,count,weight,price")


@given(TEXTS, st.integers(), st.floats(allow_nan=False), st.none() | st.floats(allow_nan=False))
def test_any_value_survives(
    tmp_path_factory: pytest.TempPathFactory, name: str, count: int, weight: float, price: float | None
) -> None:
    file = LineFile(tmp_path_factory.mktemp("lines") / "lines.csv", Fruit)
    fruit = Fruit(name, count, weight, price)
    file.append(fruit)
    assert file.read() == [fruit]


def test_a_crash_while_writing_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LineFile(tmp_path / "lines.csv", Fruit)
    file.append(APPLE)

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", crash)
        patched.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            file.append(PLUM)
    assert file.read() == [APPLE]
    file.append(PLUM)
    assert file.read() == [APPLE, PLUM]


def test_another_studys_file_is_refused(tmp_path: Path) -> None:
    LineFile(tmp_path / "lines.csv", Other).append(Other("x"))
    with pytest.raises(ConfigError, match=r"lines\.csv has the columns name, not name, count.*another folder"):
        LineFile(tmp_path / "lines.csv", Fruit).read()


def test_one_worker_starts_a_job_when_its_result_is_asked_for() -> None:
    begun: list[int] = []

    def work(job: int) -> int:
        begun.append(job)
        return 2 * job

    results = work_through([1, 2, 3], work, 1)
    assert (next(results), begun) == (2, [1])
    assert (list(results), begun) == ([4, 6], [1, 2, 3])


def test_several_workers_do_every_job_once() -> None:
    assert sorted(work_through([1, 2, 3, 4, 5], partial(pow, 2), 2)) == [2, 4, 8, 16, 32]


def test_a_job_that_fails_stops_the_study() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(work_through(["1", "x"], int, 2))


STUDY = """
import time
from simulations.study_lines import work_through

if __name__ == "__main__":
    list(work_through([86400, 86400], time.sleep, 2))
"""


def test_no_process_outlives_a_study_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    study = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    try:
        waited(lambda: study.poll() is not None or len(session_of(study.pid)) >= 3)  # the study, and two that work
        assert study.poll() is None
        study.kill()
        study.wait(600)
        waited(lambda: not session_of(study.pid))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


def session_of(leader: int) -> list[int]:
    """The living processes of a session."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            number, _, rest = path.read_text().partition(" (")
            state, _, _, session = rest.rpartition(") ")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(number))
    return found


def waited(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
