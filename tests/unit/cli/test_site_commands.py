"""`cloister site`: a file that is written loads, checks name what fails, approvals and bundles are kept."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.main import app
from client.bundles import allowed_bundles, own_bundle_digest
from client.node import _copy_bundles, prepare_node
from client.shim import checked
from client.site_file import read_site_file
from conf.schema.strategy_rules import STRATEGY_VARIANTS
from protocol.errors import ConfigError

GIVEN = ("--name", "harbor", "--epsilon", "4", "--published-records", "100")


def run(*arguments: str, answers: str = "") -> Result:
    return CliRunner().invoke(app, ["site", *arguments], input=answers)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": f" c{n}"}) + "\n" for n in range(20)))
    path, state = tmp_path / "site.yaml", tmp_path / "s"
    done = run("init", "--yes", "--config", str(path), "--data", str(records), "--state", str(state), *GIVEN)
    assert done.exit_code == 0, done.output
    return path


def test_init_writes_a_file_that_says_everything(config: Path) -> None:
    file = read_site_file(config)
    assert (file.name, file.published_records) == ("harbor", 100)
    assert file.budget is not None
    assert (file.budget.epsilon, file.budget.delta) == (4, 0.001)
    assert file.budget.expires is not None
    assert file.policy is not None
    assert file.policy.require_approval
    assert file.policy.bases is not None, "the installed base is pinned"
    kinds = {variant.model_fields["kind"].default for variant in STRATEGY_VARIANTS}
    assert set(file.policy.strategies or ()) == kinds, "written out, so that a later release adds none"
    assert file.policy.quantization == ()
    written = yaml.safe_load(config.read_text())["policy"]
    assert written.keys() == type(file.policy).model_fields.keys()


def test_init_asks_and_replaces_nothing(config: Path, tmp_path: Path) -> None:
    again = run("init", "--yes", "--config", str(config))
    assert isinstance(again.exception, ConfigError)
    assert "exists; write another with --config, or replace it with --force" in str(again.exception)

    asked = tmp_path / "asked.yaml"
    answers = '200\nnorth "gate"\n'.replace('north "gate"', "northgate") + "\n" * 9
    done = run("init", "--config", str(asked), "--state", str(tmp_path / "t"), answers=answers)
    assert done.exit_code == 0, done.output
    assert read_site_file(asked).name == "northgate"
    assert read_site_file(asked).published_records == 200


def test_check_proves_what_works_and_says_how_to_mend_the_rest(config: Path) -> None:
    good = run("check", "--config", str(config))
    assert good.exit_code == 0, good.output
    assert "20 records fit the schema" in re.sub(r"\s+", " ", good.output)

    written = yaml.safe_load(config.read_text())
    written["policy"]["bases"] = ["0" * 64]
    written["data"]["columns"] = {"kind": "text"}
    written["budget"]["expires"] = "2020-01-01"
    written["node"] = {"superlink": "127.0.0.1:1", "insecure": True}
    config.write_text(yaml.safe_dump(written))
    Path(written["state_directory"]).chmod(0o755)
    bad = run("check", "--config", str(config))
    assert bad.exit_code == 1
    failed = [line.split()[1] for line in bad.output.splitlines() if "FAIL" in line]
    assert failed == ["budget", "keys", "model", "data", "server"]
    assert "chmod" in bad.output


def test_pending_approve_and_revoke(config: Path) -> None:
    assert "no experiment waits for approval" in run("pending", "--config", str(config)).output
    assert "approved" in run("approve", "a" * 64, "--config", str(config)).output
    shown = run("pending", "--all", "--config", str(config)).output
    assert "aaaaaaaaaaaaaaaa" in shown
    assert "revoked" in run("revoke", "a" * 8, "--config", str(config)).output
    assert "no digest" in str(run("approve", "x", "--config", str(config)).exception)


def test_bundles_are_listed_and_everything_else_is_refused(config: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "other.fab"
    bundle.write_bytes(b"other")
    assert own_bundle_digest() in run("allow-bundle", "--config", str(config)).output
    assert "other.fab" in run("allow-bundle", str(bundle), "--config", str(config)).output
    assert "no SHA-256 digest" in str(run("allow-bundle", "abc", "--config", str(config)).exception)

    path = tmp_path / "s" / "allowed_bundles"
    assert len(allowed_bundles(path)) == 2
    installed: list[bytes] = []
    install = checked(lambda content, **_: installed.append(content), path)
    install(b"other", skip_prompt=True)
    with pytest.raises(PermissionError, match="is not on this site's list"):
        install(b"stranger", skip_prompt=True)
    assert installed == [b"other"]
    assert allowed_bundles(tmp_path / "none") == frozenset()


def test_another_users_copy_of_the_list_follows_it(tmp_path: Path) -> None:
    listed, copy = tmp_path / "listed", tmp_path / "copy"
    for content in (f"{'a' * 64}  x\n", ""):
        listed.write_text(content)
        _copy_bundles(listed, copy, None)
        assert copy.read_text() == content
    listed.write_text("b" * 64)
    _copy_bundles(listed, copy, None)
    listed.unlink()
    _copy_bundles(listed, copy, None)
    assert allowed_bundles(copy) == frozenset()


def test_the_commands_of_a_node(config: Path) -> None:
    with pytest.raises(ConfigError, match="has no `node` section"):
        prepare_node(read_site_file(config))
    written = yaml.safe_load(config.read_text())
    written["node"] = {
        "superlink": "example.org:443",
        "root_certificates": "/etc/ca.pem",
        "private_key": "/etc/node.key",
    }
    config.write_text(yaml.safe_dump(written))
    folder = Path(written["state_directory"]) / "run"
    with pytest.raises(ConfigError, match="start the site first: cloister site serve"):
        prepare_node(read_site_file(config))
    folder.mkdir(parents=True)
    made = prepare_node(read_site_file(config))
    command = " ".join(made.supernode)
    assert "--superlink example.org:443 --root-certificates /etc/ca.pem --auth-supernode-private-key" in command
    assert "--isolation process" in command
    assert f'socket="{folder / "site.sock"}"' in command
    assert "site.yaml" not in command
    assert made.environment["PATH"].split(os.pathsep)[0] == str(folder / "bin")
    assert (folder / "superexec.secret").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in (folder / "bin").iterdir()} >= {"flwr-clientapp", "flwr-serverapp", "flwr-agentapp"}


def test_only_root_starts_the_node_as_another_user(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = yaml.safe_load(config.read_text())
    written["serve"]["socket"] = str(config.parent / "r" / "site.sock")
    written["node"] = {"superlink": "h:1", "user": "daemon"}
    config.write_text(yaml.safe_dump(written))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match=r"only root can start the SuperNode as node.user='daemon'"):
        prepare_node(read_site_file(config))
    written["node"]["user"] = "nobody-at-all"
    config.write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match="is no user of this machine"):
        prepare_node(read_site_file(config))
