"""Inputs that fuzzing found are decoded or refused, within the limits; and the limits catch what they are there for."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def fuzzer(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The targets, as the driver imports them."""
    targets = fuzzer("targets")
    monkeypatch.setitem(sys.modules, "targets", targets)
    return targets


def test_the_corpus_is_decoded_or_refused() -> None:
    """In a process of its own: the address space of this one cannot be limited fairly."""
    command = [sys.executable, "-W", "ignore", str(HERE / "fuzz.py"), "--replay"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+): (\d+) inputs$", done.stdout, re.MULTILINE)}
    assert counts.keys() == fuzzer("targets").TARGETS.keys()
    assert all(count >= 2 for count in counts.values()), counts


def test_the_corpus_is_small() -> None:
    files = [path for path in (HERE / "corpus").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000


def test_honest_messages_are_decoded(planted: ModuleType) -> None:
    """Or the targets would only ever see refusals."""
    for name in planted.TARGETS:
        assert "decoded" in {planted.run(name, data) for data in planted.seeds(name)}, name


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda data: 1 // 0, ZeroDivisionError),
        (lambda data: bytearray(1 << 23), AssertionError),
        (lambda data: bytearray(1 << 33), MemoryError),
    ],
    ids=["another exception", "much memory", "absurd memory"],
)
def test_a_faulty_decoder_is_found(fault: object, found: type[Exception], planted: ModuleType) -> None:
    planted.TARGETS["card"], honest = fault, planted.TARGETS["card"]
    driver = fuzzer("fuzz")
    driver._warm_up = lambda name: None
    with pytest.raises(found):
        driver._replay("card", [b"x"])
    planted.TARGETS["card"] = honest
    driver._replay("card", [b"x"])
