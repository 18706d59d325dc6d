"""A served site: warm, one instruction at a time, stopped without under-counting, and alone on its state."""

import stat
from collections.abc import Callable

import pytest
import torch

from protocol.errors import SiteRefusal
from protocol.instructions import Instruction, Reply

from .conftest import SiteProcess

pytestmark = [pytest.mark.slow, pytest.mark.deployment]
Make = Callable[..., SiteProcess]
Instruct = Callable[..., Instruction]


def same(left: Reply, right: Reply) -> bool:
    return left.header == right.header and all(torch.equal(left.tensors[n], right.tensors[n]) for n in left.tensors)


def test_rounds_replays_and_restarts(make_site: Make, instruct: Instruct) -> None:
    site = make_site().start()
    assert stat.S_IMODE(site.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(site.socket.parent.stat().st_mode) == 0o700

    first = site.ask(instruct())
    assert first.header.status == "trained", site.text()
    assert same(site.ask(instruct()), first)
    assert site.kinds() == ["reserve", "commit"]
    assert "the stored reply is sent again" in site.text()
    other = site.ask(instruct(nudge=0.01))
    assert (other.header.status, other.header.code) == ("refused", "replay_mismatch")
    assert site.kinds() == ["reserve", "commit"]

    assert site.stop() == 0
    assert not site.socket.exists()
    with pytest.raises(SiteRefusal, match="does not answer") as caught:
        site.ask(instruct())
    assert caught.value.code == "site_down"

    site.log.write_text("")
    site.start()
    assert same(site.ask(instruct()), first)
    assert site.ask(instruct(round_number=2)).header.status == "trained"
    assert site.kinds() == ["reserve", "commit"] * 2
    stored = list((site.state / "replies").iterdir())
    assert len(stored) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in stored} == {0o600}
