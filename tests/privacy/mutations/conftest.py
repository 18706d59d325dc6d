"""A small real experiment, observed by the doctor; and a way to plant a fault that only a test has."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import client.rounds
import simulations.doctor
from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from privacy.doctor.diagnosis import diagnose
from privacy.doctor.subject import Subject
from simulations.doctor import observe_site
from simulations.population import Population, build_population

RECORDS, USERS = 60, 20
SETTINGS = (
    "model=causal_lm",
    "strategy=fedit",
    "peft.rank=4",
    "data=jsonl_text",
    "data.split_column=kind",
    "data.partition.sites=1",
    "federation.rounds=2",
    "federation.local.steps=3",
    "federation.local.expected_batch_size=8",
    "privacy.batch_cap=null",
)
WORDS = ("sore", "throat", "fever", "pain", "stairs", "pulse", "normal", "prince", "silence", "battery", "great")


@pytest.fixture(scope="session")
def experiment(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """One site with 60 records of 20 users; the adapter of a tiny Llama."""
    rows = [
        {"text": " ".join(WORDS[(n * 7 + k * k) % len(WORDS)] for k in range(2 + n % 5)), "user": f"u{n % USERS}"}
        for n in range(RECORDS)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "kind": "train"}) + "\n" for row in rows))
    held = json.dumps({"text": "sore throat", "user": "u0", "kind": "heldout"})
    path.write_text(path.read_text() + held + "\n")
    return compose_experiment([*SETTINGS, f"model.path={tiny_model('llama')}", f"data.source.path={path}"])


@pytest.fixture(scope="session")
def population(experiment: Experiment) -> Population:
    return build_population(experiment)


@pytest.fixture
def observe(experiment: Experiment, population: Population, tmp_path: Path) -> Callable[[], Subject]:
    """Return what the doctor observes of the real code, as it is when called."""
    return lambda: observe_site(experiment, population.parts, tmp_path)


@dataclass(frozen=True)
class Caught:
    """A planted fault, what it does, and the checks that failed: first the one that had to, whose code is `code`."""

    fault: str
    what: str
    checks: tuple[str, ...]
    code: int


CAUGHT = pytest.StashKey[dict[str, Caught]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/mutations.md from what was caught")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): the fault that the test plants")
    config.stash[CAUGHT] = {}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    """Replace a function where rounds call it, and where the doctor's own probe does."""

    def replace_everywhere(name: str, value: object) -> None:
        for module in (client.rounds, simulations.doctor):
            monkeypatch.setattr(module, name, value)

    return replace_everywhere


@pytest.fixture
def catches(observe: Callable[[], Subject], request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Assert that a check, given by its exit code, fails; note all that fail for the table."""

    def assert_caught(code: int) -> None:
        verdicts = diagnose(observe())
        failed = {number: verdict for number, verdict in verdicts.items() if verdict.passed is False}
        assert code in failed, f"check {code} did not fail; failed: {failed}"
        fault = request.node.get_closest_marker("fault").args[0]
        checks = (verdicts[code].name, *(verdict.name for number, verdict in failed.items() if number != code))
        request.config.stash[CAUGHT][fault] = Caught(fault, (request.function.__doc__ or "").strip(), checks, code)

    return assert_caught


@pytest.fixture
def caught(request: pytest.FixtureRequest) -> dict[str, Caught]:
    """What the tests before this one have caught."""
    return request.config.stash[CAUGHT]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table: what was planted, and what caught it."""
    rows = list(config.stash[CAUGHT].values())
    if not rows:
        return
    terminalreporter.section("planted faults")
    for row in rows:
        terminalreporter.write_line(f"{row.fault:<45} caught by: {'; '.join(row.checks)}")
