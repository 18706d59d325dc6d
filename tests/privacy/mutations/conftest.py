"""A small real experiment, observed by the doctor; and a way to plant a fault that only a test has."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import client.training
from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from privacy.doctor.diagnosis import diagnose
from privacy.doctor.subject import Subject
from simulations.doctor import observe_site
from simulations.population import build_population

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
    "data.user_column=user",
)
WORDS = ("sore", "throat", "fever", "pain", "stairs", "pulse", "normal", "prince", "silence", "battery", "great")


Configure = Callable[..., Experiment]
Observe = Callable[..., Subject]


@pytest.fixture(scope="session")
def configure(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Compose an experiment: one site with 60 records of 20 users, and the adapter of a tiny Llama."""
    rows = [
        {
            "text": " ".join(WORDS[(n * 7 + k * k) % len(WORDS)] for k in range(2 + n % 5)),
            "user": f"u{n % USERS}",
            "class": "odd" if n % 2 else "even",
        }
        for n in range(RECORDS)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "kind": "train"}) + "\n" for row in rows))
    held = json.dumps({"text": "sore throat", "user": "u0", "class": "odd", "kind": "heldout"})
    path.write_text(path.read_text() + held + "\n")
    fixed = [*SETTINGS, f"model.path={tiny_model('llama')}", f"data.source.path={path}"]
    return lambda *overrides: compose_experiment([*fixed, *overrides])


@pytest.fixture
def observe(configure: Configure, tmp_path: Path) -> Observe:
    """Return what the doctor observes of the real code, as it is when called, under some overrides."""

    def observed(*overrides: str) -> Subject:
        experiment = configure(*overrides)
        return observe_site(experiment, build_population(experiment).parts, tmp_path)

    return observed


@pytest.fixture
def head_alone(tiny_model: Callable[..., Path]) -> tuple[str, ...]:
    """Overrides that train nothing but a head, on summaries of texts."""
    return (
        f"model.path={tiny_model('bert')}",
        "task=classification",
        "task.labels=[even,odd]",
        "task.pooling=mean",
        "data.columns={kind:labelled,text:text,label:class}",
        "peft=head",
    )


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
    """Replace a function that a round's training calls."""
    return lambda name, value: monkeypatch.setattr(client.training, name, value)


@pytest.fixture
def catches(observe: Observe, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Assert that a check, given by its exit code, fails under some overrides; note all that fail for the table."""

    def assert_caught(code: int, *overrides: str) -> None:
        verdicts = diagnose(observe(*overrides))
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
