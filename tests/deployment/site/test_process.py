"""A served site: warm, one instruction at a time, stopped without under-counting, and alone on its state."""

import os
import socket
import stat
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from client.relay import relay
from protocol.errors import SiteRefusal
from protocol.frames import receive_frame, refusal_record, send_frame
from protocol.instructions import Instruction, Reply
from protocol.records import challenge_to_record, instruction_to_record, record_to_card, record_to_reply

from .conftest import CLOISTER, SiteProcess

pytestmark = [pytest.mark.slow, pytest.mark.deployment]
Make = Callable[..., SiteProcess]
Instruct = Callable[..., Instruction]
LONG = "federation.local.steps=400"


def same(left: Reply, right: Reply) -> bool:
    return left.header == right.header and all(torch.equal(left.tensors[n], right.tensors[n]) for n in left.tensors)


def test_rounds_replays_and_restarts(make_site: Make, instruct: Instruct) -> None:
    site = make_site().start()
    assert stat.S_IMODE(site.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(site.socket.parent.stat().st_mode) == 0o700
    assert record_to_card(relay(site.socket, "query", challenge_to_record(bytes(32)))).site == "harbor"

    first = site.ask(instruct())
    assert first.header.status == "trained", site.text()
    assert same(site.ask(instruct()), first)
    assert site.kinds() == ["reserve", "commit"]
    assert "the stored reply is sent again" in site.text()
    other = site.ask(instruct(nudge=0.01))
    assert (other.header.status, other.header.code) == ("refused", "replay_mismatch")
    assert site.kinds() == ["reserve", "commit"]

    again = subprocess.run((*CLOISTER, "site", "serve", "--config", site.config), capture_output=True, text=True)
    assert again.returncode == 2
    assert "another process serves" in again.stderr

    assert site.stop() == 0
    assert not site.socket.exists()
    with pytest.raises(SiteRefusal, match="does not answer") as caught:
        site.ask(instruct())
    assert caught.value.code == "site_down"

    site.start()
    assert same(site.ask(instruct()), first)
    assert site.ask(instruct(round_number=2)).header.status == "trained"
    assert site.kinds() == ["reserve", "commit"] * 2
    stored = list((site.state / "replies").iterdir())
    assert len(stored) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in stored} == {0o600}


@pytest.mark.rare
def test_a_second_server_is_told_busy_and_a_killed_round_counts(make_site: Make, instruct: Instruct) -> None:
    site = make_site().start()
    asked = instruct(LONG)
    lost: list[str] = []

    def first_server() -> None:
        try:
            relay(site.socket, "train", instruction_to_record(asked))
        except SiteRefusal as refusal:
            lost.append(refusal.code)

    asking = threading.Thread(target=first_server)
    asking.start()
    site.wait_for(["reserve"])
    second = site.ask(instruct(run="another server's"))
    assert second.header.code == "busy"
    assert record_to_card(relay(site.socket, "query", challenge_to_record(bytes(32)))).site == "harbor", (
        "cards are given at any time"
    )
    site.kill()
    asking.join(600)
    assert lost == ["site_down"]
    assert site.kinds() == ["reserve"], "killed in training: booked, never committed, nothing left"

    site.start()
    other = site.ask(instruct(round_number=2))
    assert other.header.privacy is not None, other.header
    assert other.header.privacy.steps_executed == 402, "the 400 steps of the killed round count"
    assert site.kinds() == ["reserve", "reserve", "commit"]


@pytest.mark.rare
def test_a_stop_lets_the_round_finish_or_leaves_it_booked(make_site: Make, instruct: Instruct) -> None:
    site = make_site(serve={"stop_grace_s": 60.0}).start()
    answers: list[Reply] = []
    asking = threading.Thread(target=lambda: answers.append(site.ask(instruct("federation.local.steps=40"))))
    asking.start()
    site.wait_for(["reserve"])
    assert site.stop() == 0
    asking.join(600)
    assert [answer.header.status for answer in answers] == ["trained"], "the answer of a round that ended is sent"
    assert site.kinds() == ["reserve", "commit"]

    site.change(serve={"stop_grace_s": 0.0})
    site.start()
    asking = threading.Thread(target=quietly, args=(site, instruct(LONG, round_number=2)))
    asking.start()
    site.wait_for(["reserve", "commit", "reserve"])
    assert site.stop() == 0
    asking.join(600)
    assert "what it reserved counts as spent" in site.text()
    assert site.kinds() == ["reserve", "commit", "reserve"]


def test_killed_at_the_commit_a_round_is_answered_once_and_booked_once(make_site: Make, instruct: Instruct) -> None:
    """Before or after the reply was stored and sent: nobody can tell, and it makes no difference."""
    site = make_site().start()
    asking = threading.Thread(target=quietly, args=(site, instruct()))
    asking.start()
    site.wait_for(["reserve", "commit"])
    site.kill()
    asking.join(600)

    site.start()
    first, again = site.ask(instruct()), site.ask(instruct())
    assert same(first, again)
    assert first.header.privacy is not None, first.header
    assert first.header.privacy.steps_executed == 2, "the same noise, the same bits, no further cost"
    assert site.kinds() == ["reserve", "commit"]


def quietly(site: SiteProcess, asked: Instruction) -> None:
    with suppress(SiteRefusal):
        site.ask(asked)


def test_a_loopback_port_wants_the_token(make_site: Make, instruct: Instruct) -> None:
    site = make_site(serve={"listen": "tcp"}).start()
    assert stat.S_IMODE(site.socket.stat().st_mode) == 0o600
    assert site.ask(instruct()).header.status == "trained"
    good = site.socket.read_text()
    port = int(good.split('"port": ')[1].split(",")[0])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        send_frame(stranger, b"0" * 64)
        assert receive_frame(stranger, 1 << 20) is None
    assert "a connection was turned away" in site.text()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away(make_site: Make) -> None:
    site = make_site().start()
    site.socket.parent.chmod(0o755)  # as if an operator had opened the folder
    site.socket.chmod(0o666)
    for folder in site.socket.parents:
        if not folder.stat().st_mode & 0o001 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    program = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1]); s.settimeout(600)\n"
        "try: print(s.recv(1))\n"
        "except ConnectionResetError: print(b'')"
    )
    done = subprocess.run((CLOISTER[0], "-c", program, site.socket), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "b''"
    assert "a connection was turned away" in site.text()


def test_a_refusal_of_a_relay_decodes_as_a_reply() -> None:
    assert record_to_reply(refusal_record("site_down")).header.code == "site_down"
