"""A SuperNode of another user: who may open the socket, and who can read the node key."""

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.check import _node
from client.listening import open_listener
from conf.compose import compose_experiment
from conf.schema.site import SiteFile, SiteNode
from protocol.errors import ConfigError

GUEST, SITE_USER = "nobody", "daemon"


@pytest.fixture
def file() -> Iterator[SiteFile]:
    """A site file whose folders a user without privileges may make and enter."""
    folder = Path(tempfile.mkdtemp(prefix="cloister-"))
    folder.chmod(0o777)
    content = {
        "name": "clinic",
        "published_records": 10,
        "data": compose_experiment().data.model_dump(mode="json"),
        "model_path": "embedded:clinic-base",
        "state_directory": str(folder / "s"),
        "serve": {"socket": str(folder / "run" / "site.sock")},
        "node": {"superlink": "h:1", "user": GUEST},
    }
    yield SiteFile.model_validate(content)
    shutil.rmtree(folder)


@contextmanager
def unprivileged(*groups: int) -> Iterator[str]:
    """Be a user without privileges, in these further groups, and yield the name."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    user, own_groups, own_group = pwd.getpwnam(SITE_USER), os.getgroups(), os.getgid()
    os.setgroups(groups)
    os.setresgid(user.pw_gid, user.pw_gid, 0)
    os.setresuid(user.pw_uid, user.pw_uid, 0)
    try:
        yield user.pw_name
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(own_group, own_group, own_group)
        os.setgroups(own_groups)


def test_a_site_user_outside_of_the_nodes_group_is_told_which_group(file: SiteFile) -> None:
    with (
        unprivileged() as this,
        pytest.raises(ConfigError, match=rf"of which it is no member; run as root: usermod -aG \w+ {this}; then"),
    ):
        open_listener(file)


def test_a_member_of_the_nodes_group_opens_folder_and_socket_to_it(file: SiteFile) -> None:
    guest = pwd.getpwnam(GUEST)
    with unprivileged(), pytest.raises(ConfigError, match="no member"):
        open_listener(file)  # leaves a folder behind, which must be mended by the next start
    with unprivileged(guest.pw_gid):
        listener = open_listener(file)
    try:
        found = {path: path.stat() for path in (listener.path, listener.path.parent)}
        assert [each.st_gid for each in found.values()] == [guest.pw_gid] * 2
        assert [each.st_mode & 0o777 for each in found.values()] == [0o660, 0o750]
        assert {each.st_uid for each in found.values()} == {pwd.getpwnam(SITE_USER).pw_uid}
    finally:
        listener.close()


def test_check_reads_the_node_key_or_leaves_that_to_root(file: SiteFile) -> None:
    folder = Path(file.state_directory).parent
    key, authority = folder / "node", folder / "ca.crt"
    authority.write_text("the authority")
    key.write_text("the key")
    key.chmod(0o600)  # and root's
    content = {"superlink": "h:1", "root_certificates": str(authority), "private_key": str(key)}
    alone, guided = (
        file.model_copy(update={"node": SiteNode.model_validate({**content, "user": user})}) for user in (None, GUEST)
    )
    with unprivileged():
        assert "which this user cannot read: root reads it at the start" in str(_node(guided))
        with pytest.raises(PermissionError):
            _node(alone)
    assert _node(alone) == _node(guided) == "TLS and node key"
    key.chmod(0o640)
    with pytest.raises(ConfigError, match=f"others can read {key}; run: chmod 600 {key}"):
        _node(guided)
