"""What `cloister run` sends: one experiment as JSON, its digest, and the name of its run directory."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from conf.schema.experiment import Experiment
from conf.schema.paths import expanded
from protocol.bundle import RUN_CONFIG_KEYS
from protocol.errors import ConfigError
from server.deployment.bundle import refresh_bundle
from server.deployment.flower import Flower
from server.deployment.folder import ServerFolder

__all__ = ["Submission", "as_toml", "find_submission", "read_submissions", "run_config", "submit", "text_digest"]


@dataclass(frozen=True)
class Submission:
    """A run that was handed to the SuperLink."""

    run: str
    """Its run directory's name; `cloister logs`, `stop` and `runs` know it by that."""
    flower_run: str
    name: str
    digest: str
    rounds: int
    submitted: str


def text_digest(experiment: str) -> str:
    """Return the SHA-256 of an experiment as it is sent; the ServerApp compares it before anything else."""
    return hashlib.sha256(experiment.encode()).hexdigest()


def run_config(experiment: Experiment, run: str, resume: str = "") -> dict[str, str]:
    """Return Flower's run config: flat strings, under keys that the bundle declares.

    Args:
        experiment: what to run.
        run: name of the run directory, on the ServerApp's machine.
        resume: name of an existing run directory to go on from.
    """
    text = experiment.canonical_json()
    config = {"experiment": text, "digest": text_digest(text), "run": run, "resume": resume}
    assert config.keys() <= set(RUN_CONFIG_KEYS)
    return config


def submit(folder: ServerFolder, flower: Flower, experiment: Experiment, now: datetime, resume: str = "") -> Submission:
    """Hand an experiment to the SuperLink.

    Raises:
        ConfigError: it names files that the ServerApp would look for elsewhere.
        CloisterError: the SuperLink did not take it; saying what to do.
    """
    _refuse_relative_paths(experiment)
    run = resume or f"{now:%Y%m%d-%H%M%S}-{experiment.name}-{experiment.digest[:6]}"
    refresh_bundle(folder.bundle)
    folder.submitted.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.submitted) as work:
        file = Path(work) / "run.toml"
        file.write_text(as_toml(run_config(experiment, run, resume)))
        number = flower.submit(folder.bundle, file)
    text = experiment.canonical_json()
    made = Submission(
        run, number, experiment.name, text_digest(text), experiment.federation.rounds, now.isoformat(timespec="seconds")
    )
    (folder.submitted / f"{number}.json").write_text(json.dumps(asdict(made), indent=1))
    return made


def read_submissions(folder: ServerFolder) -> dict[str, Submission]:
    """Return what was submitted from this folder, by Flower's number."""
    found = [Submission(**json.loads(path.read_text())) for path in sorted(folder.submitted.glob("*.json"))]
    return {submission.flower_run: submission for submission in found}


def find_submission(folder: ServerFolder, asked: str) -> str:
    """Return Flower's number of a run, given by that number, by its name, by the start of its name, or as `last`.

    Raises:
        ConfigError: none, or several, are meant.
    """
    submissions = sorted(read_submissions(folder).values(), key=lambda item: (item.submitted, item.run))
    if asked == "last" and submissions:
        return submissions[-1].flower_run
    meant = [item for item in submissions if asked in (item.run, item.flower_run)]
    # A resumed run has several numbers; the newest one is running.
    meant = meant[-1:] or [item for item in submissions if item.run.startswith(asked)]
    if len(meant) == 1:
        return meant[0].flower_run
    if not meant and asked.isdigit():
        return asked
    known = ", ".join(item.run for item in submissions[-5:]) or "none yet"
    problem = "the start of several runs" if meant else "no run submitted from here"
    raise ConfigError(f"{asked!r} is {problem}; the latest are: {known}")


def _refuse_relative_paths(experiment: Experiment) -> None:
    """The ServerApp works in another folder, perhaps as another user."""
    problems: list[str] = []
    source, model = experiment.data.source, experiment.model.path
    local_data = source.format != "hub" and not source.path.startswith("embedded:")
    # A model's relative path may be a hub id; one that exists here surely is not.
    local_model = not model.startswith("embedded:") and Path(expanded(model)).exists()
    for key, value, local in (("data.source.path", source.path, local_data), ("model.path", model, local_model)):
        if local and not Path(value).is_absolute():
            why = "begins with ~, another user's home there" if value.startswith("~") else "is relative"
            whole = Path(expanded(value)).resolve()
            problems.append(f"{key}={value} {why}; the ServerApp works elsewhere: {key}={whole}")
    if experiment.logging.directory is not None:
        problems.append(
            f"logging.directory={experiment.logging.directory} is not for deployed runs: they go to the server's runs/"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def as_toml(values: Mapping[str, str]) -> str:
    """Return flat strings as TOML."""
    # Without \u escapes, a JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    return "".join(lines).replace("\x7f", "\\u007f")
