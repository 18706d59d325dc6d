"""`cloister site`: a file that is written loads, checks name what fails, approvals and bundles are kept."""

import json
import os
import pwd
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.main import app
from client.bundles import allowed_bundles, own_bundle_digest
from client.node import NodeProcesses, _copy_bundles, prepare_node
from client.shim import checked
from client.site_file import read_site_file
from conf.schema.site import SiteFile
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


def test_init_writes_paths_that_hold_wherever_the_site_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("--data", "r.jsonl", "--state", "s", "--superlink", "h:1", "--root-certificates", "ca.crt")
    assert run("init", "--yes", *GIVEN, *given).exit_code == 0
    file = read_site_file(tmp_path / "site.yaml")
    assert file.node is not None
    written = (file.data.source.path, file.state_directory, file.node.root_certificates)  # type: ignore[union-attr]
    assert written == tuple(str(tmp_path / name) for name in ("r.jsonl", "s", "ca.crt"))


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


def with_node(config: Path, **node: object) -> SiteFile:
    """The site's file, now with a `node` section and beside it a key and a certificate."""
    (config.parent / "ca.crt").write_text("the authority")
    key = config.parent / "node"
    if not key.exists():
        key.write_text("the key")
        key.chmod(0o600)
    written = yaml.safe_load(config.read_text())
    written["node"] = {"superlink": "example.org:443", "root_certificates": "ca.crt", "private_key": "node", **node}
    written["serve"]["socket"] = str(config.parent / "r" / "site.sock")
    config.write_text(yaml.safe_dump(written))
    return read_site_file(config)


def option(made: NodeProcesses, name: str) -> Path:
    return Path(made.supernode[made.supernode.index(name) + 1])


def test_the_commands_of_a_node(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start where the command is given; the SuperNode's own processes start elsewhere."""
    with pytest.raises(ConfigError, match="has no `node` section"):
        prepare_node(read_site_file(config))
    file, folder = with_node(config), config.parent / "r"
    with pytest.raises(ConfigError, match="start the site first: cloister site serve"):
        prepare_node(file)
    assert not Path(file.state_directory).exists(), "root would have made what the site's user cannot enter"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"node.root_certificates=ca.crt cannot be read .* a relative path starts"):
        prepare_node(file)
    monkeypatch.chdir(config.parent)
    made = prepare_node(file)
    assert option(made, "--superlink") == Path("example.org:443")
    assert option(made, "--root-certificates") == config.parent / "ca.crt"
    assert option(made, "--auth-supernode-private-key") == config.parent / "node"
    command = " ".join(made.supernode)
    assert "--isolation process" in command
    assert f'socket="{folder / "site.sock"}"' in command
    assert "site.yaml" not in command
    assert made.environment["PATH"].split(os.pathsep)[0] == str(folder / "bin")
    assert (folder / "superexec.secret").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in (folder / "bin").iterdir()} >= {"flwr-clientapp", "flwr-serverapp", "flwr-agentapp"}


def test_another_users_node_gets_copies_that_it_can_read_and_not_change(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = account("nobody")
    folder = config.parent / "r"
    folder.mkdir()
    monkeypatch.chdir(config.parent)
    made = prepare_node(with_node(config, user=guest.pw_name))
    for name, content in (("--root-certificates", "the authority"), ("--auth-supernode-private-key", "the key")):
        copy = option(made, name)
        assert copy.parent == folder
        assert copy.read_text() == content
        found = copy.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (0, guest.pw_gid, 0o640)


def test_the_list_of_bundles_stays_the_site_users_own_though_root_makes_it(config: Path) -> None:
    owner, file = account("daemon"), with_node(config, root_certificates=None, private_key=None)
    state = Path(file.state_directory)
    for folder in (state, config.parent / "r"):
        folder.mkdir(mode=0o700)
    os.chown(state, owner.pw_uid, owner.pw_gid)
    prepare_node(file)
    listed = (state / "allowed_bundles").stat()
    assert (listed.st_uid, listed.st_gid) == (owner.pw_uid, owner.pw_gid)


def account(name: str) -> pwd.struct_passwd:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    return pwd.getpwnam(name)


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
