"""`~` is the home directory wherever a person gives a path."""

import sys
from pathlib import Path

import click
import pytest
import typer

from conf.compose import InvalidConfiguration, compose_experiment, split_sweep
from conf.schema.model import Model
from conf.schema.paths import expanded
from conf.schema.site import SiteFile


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def site_file(**changes: object) -> SiteFile:
    tree: dict[str, object] = {
        "name": "north",
        "published_records": 10,
        "data": {"source": {"path": "~/a.jsonl"}, "columns": {"kind": "text"}},
        "model_path": "~/base",
        "state_directory": "~/state",
    }
    return SiteFile.model_validate({**tree, **changes})


def test_only_a_leading_tilde_is_home(home: Path) -> None:
    assert expanded("~") == str(home)
    assert expanded("~/a b/~") == f"{home}/a b/~"
    for path in (
        "",
        "a/~/b",
        "./~",
        "embedded:clinics",
        "postgresql://me@host/~",
        "~nobody-of-this-name/a",
        "own/base",
    ):
        assert expanded(path) == path


def test_without_a_home_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(
        ValueError, match=r"'~/a' begins with ~, and HOME names no home directory; write the whole path"
    ):
        expanded("~/a")


def test_every_path_of_a_site_file_is_expanded(home: Path) -> None:
    node = {"superlink": "h:1", "root_certificates": "~/ca.pem", "private_key": "~/node.key"}
    file = site_file(ledger="~/l.db", serve={"socket": "~/run/s.sock"}, node=node)
    assert (file.model_path, file.state_directory, file.ledger) == (f"{home}/base", f"{home}/state", f"{home}/l.db")
    assert file.serve.socket == f"{home}/run/s.sock"
    assert file.node is not None
    assert (file.node.root_certificates, file.node.private_key) == (f"{home}/ca.pem", f"{home}/node.key")
    assert site_file(ledger="postgresql+psycopg://u@h/db").ledger == "postgresql+psycopg://u@h/db"


def test_the_folder_of_a_model_is_expanded(home: Path) -> None:
    from finetuning.models import base_digest
    from finetuning.shapes import _local_folder  # pyright: ignore[reportPrivateUsage]

    (home / "base").mkdir()
    (home / "base" / "config.json").write_text("{}")
    assert _local_folder(Model(path="~/base")) == home / "base"
    assert base_digest(Model(path="~/base")) == base_digest(Model(path=str(home / "base")))


@pytest.mark.parametrize("override", ["model.path=~/x", "model.path='~/x'", 'model.path="~/x"', "++model.path=~/x"])
def test_hydra_takes_a_tilde(override: str) -> None:
    """Kept as typed: an experiment's digest does not depend on whose machine it was written on."""
    assert compose_experiment([override]).model.path == "~/x"


def test_a_sweep_takes_several() -> None:
    assert [compose_experiment(job).model.path for job in split_sweep(["model.path=~/x,~/y,/z"])] == [
        "~/x",
        "~/y",
        "/z",
    ]
    with pytest.raises(InvalidConfiguration, match="cannot be read as an override"):
        compose_experiment(["model.path=~/x(1"])


def test_folders_of_runs_and_ledgers_are_expanded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime

    from server.app import new_run_path

    experiment = compose_experiment(["logging.directory=~/runs/one"])
    assert new_run_path(experiment, Path("runs"), datetime.now(UTC)) == home / "runs" / "one"
    monkeypatch.setenv("CLOISTER_HOME", "~/cloister")
    from simulations.population import _scratch  # pyright: ignore[reportPrivateUsage]

    _scratch.cache_clear()
    assert _scratch(7) == home / "cloister" / "simulated_sites" / "7"
    _scratch.cache_clear()


def commands(group: click.Command, name: str = "cloister") -> list[tuple[str, click.Command]]:
    if not isinstance(group, click.Group):
        return [(name, group)]
    return [found for key, sub in group.commands.items() for found in commands(sub, f"{name} {key}")]


def test_every_option_that_is_a_path_is_expanded(home: Path) -> None:
    """A shell leaves `--config=~/site.yaml` as it is."""
    from cli.main import app

    paths = [
        (f"{name} {parameter.name}", command, parameter)
        for name, command in commands(typer.main.get_command(app))
        for parameter in command.params
        if type(parameter.type).__name__.endswith("Path")
    ]
    assert len(paths) >= 20
    for name, command, parameter in paths:
        with click.Context(command) as context:
            value = parameter.process_value(context, "~/x")
        assert value == home / "x", name


@pytest.mark.skipif(sys.platform == "win32", reason="no tilde there")
def test_a_ledger_and_an_answer_to_site_init_are_expanded(home: Path) -> None:
    from cli.ledger import _place  # pyright: ignore[reportPrivateUsage]
    from cli.site import _absolute  # pyright: ignore[reportPrivateUsage]

    place = _place(None, "~/l/ledger.db", None)
    assert (place.location, place.keys) == (f"{home}/l/ledger.db", home / "l")
    assert _absolute("~/notes.jsonl") == f"{home}/notes.jsonl"
    assert (_absolute(""), _absolute("embedded:clinics")) == ("", "embedded:clinics")
