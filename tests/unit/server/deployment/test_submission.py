"""What `cloister run` sends, and what the ServerApp makes of it."""

import hashlib
import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from conf.compose import compose_experiment
from conf.schema.server import ServerFile
from protocol.bundle import RUN_CONFIG_KEYS
from protocol.errors import CloisterError, ConfigError, FederationError
from server.app import launch_from_context
from server.deployment.flower import Flower
from server.deployment.folder import ServerFolder
from server.deployment.programs import Programs
from server.deployment.submission import Submission, find_submission, read_submissions, run_config, submit

EXPERIMENT = compose_experiment(("experiment=smoke", "evaluation.every=0"))


def context(**config: str) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path))
    return tmp_path


def test_what_is_sent_arrives(home: Path) -> None:
    config = run_config(EXPERIMENT, "20261121-smoke")
    launch = launch_from_context(context(**config))
    assert launch.experiment == EXPERIMENT
    assert launch.path == home / "runs" / "20261121-smoke"
    assert config["digest"] == hashlib.sha256(config["experiment"].encode()).hexdigest()
    assert config.keys() < set(RUN_CONFIG_KEYS)


def test_an_experiment_that_changed_on_its_way_is_refused(home: Path) -> None:
    config = run_config(EXPERIMENT, "run")
    config["experiment"] = config["experiment"].replace('"rounds": 2', '"rounds": 9')
    with pytest.raises(ConfigError, match=r"the experiment that arrived has SHA-256 [0-9a-f]{12}, the one that was"):
        launch_from_context(context(**config))


@pytest.mark.parametrize("run", ["../elsewhere", "/etc", "a/b", ".hidden", "x" * 129])
def test_a_run_cannot_name_another_folder(home: Path, run: str) -> None:
    with pytest.raises(ConfigError, match=r"is no plain name of a run directory"):
        launch_from_context(context(**run_config(EXPERIMENT, run)))


def test_submitting_takes_any_text(made: ServerFolder) -> None:
    """Quotes, line ends, three quotes and characters outside ASCII survive Flower's TOML."""
    from server.deployment.submission import as_toml

    values = {"experiment": "a \"quoted\" ''' \\ line\nend\ttab ε 😀 \x1f\x7f", "run": ""}
    assert tomllib.loads(as_toml(values)) == values


class Recording(Flower):
    """Takes a run as the SuperLink would."""

    def submit(self, bundle: Path, run_config: Path) -> str:
        config = tomllib.loads(run_config.read_text())
        assert launch_from_context(context(**config)).experiment.name == "smoke"
        assert [path.name for path in bundle.iterdir()] == ["pyproject.toml"]
        return str(100 + len(list(bundle.parents[1].glob("submitted/*.json"))))


def test_runs_are_found_by_name_number_start_and_last(made: ServerFolder, home: Path) -> None:
    flower = Recording(Programs(made, 8001))
    first = submit(made, flower, EXPERIMENT, datetime(2026, 11, 21, 10, tzinfo=UTC))
    second = submit(made, flower, EXPERIMENT, datetime(2026, 11, 22, 10, tzinfo=UTC))
    assert first.run.startswith("20261121-100000-smoke-")
    assert read_submissions(made) == {"100": first, "101": second}
    assert (
        find_submission(made, first.run) == find_submission(made, "100") == find_submission(made, "20261121") == "100"
    )
    assert find_submission(made, "last") == "101"
    assert find_submission(made, "77") == "77"
    with pytest.raises(ConfigError, match=r"'2026112' is the start of several runs; the latest are: 20261121-"):
        find_submission(made, "2026112")
    with pytest.raises(ConfigError, match=r"'clinics' is no run submitted from here"):
        find_submission(made, "clinics")
    assert not [path for path in made.submitted.iterdir() if path.is_dir()]


def test_a_run_that_is_gone_on_with_has_its_newest_number(made: ServerFolder) -> None:
    for number, day in (("5", "21"), ("3", "22")):
        made_at = f"2026-11-{day}T10:00:00+00:00"
        item = {"run": "r", "flower_run": number, "name": "n", "digest": "d", "rounds": 1, "submitted": made_at}
        (made.submitted / f"{number}.json").write_text(json.dumps(item))
    assert find_submission(made, "r") == "3"
    assert read_submissions(made)["5"] == Submission("r", "5", "n", "d", 1, "2026-11-21T10:00:00+00:00")


def test_files_are_named_as_the_server_app_finds_them(made: ServerFolder, tmp_path: Path) -> None:
    experiment = compose_experiment(
        ("experiment=smoke", "data=jsonl_text", "data.source.path=notes.jsonl", f"logging.directory={tmp_path}/run")
    )
    with pytest.raises(ConfigError) as caught:
        submit(made, Recording(Programs(made, 8001)), experiment, datetime.now(UTC))
    assert (
        f"data.source.path=notes.jsonl is relative; the ServerApp works elsewhere: data.source.path={Path.cwd()}"
        in (str(caught.value))
    )
    assert "logging.directory" in str(caught.value)


def test_home_is_another_folder_for_the_server_app(
    made: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    paths = ("data.source.path=~/notes.jsonl", "model=causal_lm", "model.path=~/base")
    with pytest.raises(ConfigError) as caught:
        submit(
            made,
            Recording(Programs(made, 8001)),
            compose_experiment(("experiment=smoke", "data=jsonl_text", *paths)),
            datetime.now(UTC),
        )
    for key, typed, whole in (("data.source.path", "~/notes.jsonl", "notes.jsonl"), ("model.path", "~/base", "base")):
        assert f"{key}={typed} begins with ~, another user's home there; " in str(caught.value)
        assert f"{key}={tmp_path / whole}" in str(caught.value)


def test_a_superlink_that_is_not_there_is_named_with_the_command_that_starts_it(made: ServerFolder) -> None:
    closed = made.flower_home / "config.toml"
    closed.write_text(closed.read_text().replace(":8001", ":1"))
    flower = Flower(Programs(made, 1))
    with pytest.raises(
        FederationError, match=r"the SuperLink at 127.0.0.1:1 does not answer; start it \(cloister server"
    ):
        flower.runs()
    with pytest.raises(FederationError, match=r"does not answer; start it"):
        flower.log("5", follow=False)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("x\nInvalid run configuration", "declares other run settings than this release sends"),
        ("SSL: certificate verify failed", "shows a certificate that tls/ca.crt"),
        ("one\n\n something new \n", "Flower at 127.0.0.1:8001 said: something new"),
        ("", "Flower at 127.0.0.1:8001 said: nothing"),
    ],
)
def test_what_flower_says_becomes_what_to_do(made: ServerFolder, said: str, advice: str, settings: ServerFile) -> None:
    error = Flower(Programs(made, settings.admin_port)).advice(said)
    assert isinstance(error, CloisterError)
    assert advice in str(error)
