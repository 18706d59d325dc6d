"""What goes wrong at a served site, one fault after the other: refused with a code, nothing spent, nothing lost."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.app import ConfigRecord

from client.relay import relay
from protocol.frames import decode_frame, receive_frame
from protocol.instructions import Instruction, Reply
from protocol.records import instruction_to_record, record_to_reply

from .conftest import SiteProcess

pytestmark = [pytest.mark.slow, pytest.mark.deployment, pytest.mark.rare]
Make = Callable[..., SiteProcess]
Instruct = Callable[..., Instruction]


def with_header(instruction: Instruction, site: SiteProcess, **changes: object) -> Reply:
    """The answer to an instruction whose header was changed as JSON, past every check on the server's side."""
    record = instruction_to_record(instruction)
    header = json.loads(str(record.config_records["cloister"]["json"]))
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = header
        for key in path:
            place = place[key]
        place[last] = value
    record["cloister"] = ConfigRecord({"json": json.dumps(header)})
    return record_to_reply(relay(site.socket, "train", record))


def test_malicious_instructions_are_refused_and_the_site_goes_on(make_site: Make, instruct: Instruct) -> None:
    site = make_site(
        policy={"require_approval": False, "max_rank": 16, "min_noise_multiplier": 0.9}, serve={"max_message_mib": 4}
    ).start()
    asked = instruct()
    refused = {
        "noise_too_small": site.ask(instruct("privacy.noise_multiplier=0.5")),
        "insecure_seed": site.ask(instruct("privacy.insecure_seed=1")),
        "plan_digest": with_header(asked, site, plan__run="another"),
        "malformed_instruction": with_header(asked, site, plan__data_path="/etc/passwd"),
        "wrong_base": with_header(asked, site, base_digest="0" * 64),
        "adapter_digest": with_header(asked, site, adapter_digest="0" * 64),
        "rank_too_large": site.ask(instruct("peft.rank=64")),
    }
    assert {code: reply.header.code for code, reply in refused.items()} == {code: code for code in refused}
    assert with_header(asked, site, plan__peft__rank=10**12).header.code == "malformed_instruction"

    with socket.socket(socket.AF_UNIX) as huge:
        huge.connect(str(site.socket))
        huge.sendall((1 << 62).to_bytes(8, "big"))
        answer = receive_frame(huge, 1 << 20)
    assert answer is not None
    assert record_to_reply(decode_frame(answer)[1]).header.code == "oversized_frame"
    assert site.kinds() == []

    escaping = site.ask(instruct(run="../../../escaped\n/x"))
    assert escaping.header.status == "trained", site.text()
    files = [path for path in site.folder.parent.rglob("*") if path.is_file() and site.state not in path.parents]
    assert not [path for path in files if "escaped" in path.name]
    assert str(site.state) not in "".join(reply.header.reason for reply in refused.values())


def test_a_ledger_that_is_not_as_it_was_left_is_refused(make_site: Make, instruct: Instruct) -> None:
    site = make_site().start()
    assert site.ask(instruct()).header.status == "trained"
    ledger, old, backup = site.state / "ledger.db", site.folder / "old.db", site.folder / "backup"
    shutil.copyfile(ledger, old)
    shutil.copytree(site.state, backup, ignore=shutil.ignore_patterns("run"))
    second = site.ask(instruct(round_number=2))
    assert second.header.status == "trained"
    new = ledger.read_bytes()

    def truncated() -> None:
        ledger.write_bytes(new[: len(new) // 2])

    def altered() -> None:
        ledger.write_bytes(new.replace(b'"attempt":1', b'"attempt":7'))

    faults = (truncated, altered, ledger.unlink, lambda: shutil.copyfile(old, ledger))
    for number, fault in enumerate(faults, start=10):
        fault()
        for leftover in site.state.glob("ledger.db-*"):
            leftover.unlink()
        reply = site.ask(instruct("federation.rounds=20", round_number=number))
        assert (reply.header.status, reply.header.code) == ("refused", "ledger_unusable"), (number, site.text())
        assert reply.header.reason == "this site's ledger cannot be used"
        ledger.write_bytes(new)

    assert site.ask(instruct(round_number=2)).header.status == "trained", "what left before is repeated"
    assert site.kinds() == ["reserve", "commit"] * 2

    # All of the site comes out of one backup: nothing here knows that there was more, the server does.
    site.kill()
    shutil.rmtree(site.state)
    shutil.copytree(backup, site.state)
    site.start()
    heads = second.header.ledger_heads
    reply = with_header(instruct("federation.rounds=20", round_number=20), site, ledger_heads=heads)
    assert (reply.header.status, reply.header.code) == ("refused", "ledger_set_back"), site.text()
    assert site.kinds() == ["reserve", "commit"]


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """A file that says by how much a process started with it is off."""
    path = tmp_path / "clock"
    path.write_text("+0d")
    return path


def with_clock(clock: Path) -> tuple[str, ...]:
    """What a command is started through to see another time of day."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed")
    monotonic = ("DONT_FAKE_MONOTONIC=1", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    return ("env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={clock}", "FAKETIME_NO_CACHE=1", *monotonic)


def test_a_clock_that_moves_while_the_site_runs(make_site: Make, instruct: Instruct, clock: Path) -> None:
    now = datetime.now(UTC)
    hours = [f"{now + timedelta(hours=back):%H:%M}" for back in (-2, 4)]
    site = make_site(
        policy={"require_approval": False, "hours": {"timezone": "UTC", "start": hours[0], "end": hours[1]}},
        budget={"epsilon": 50.0, "delta": 1e-3, "expires": (now + timedelta(days=10)).date()},
    ).start(*with_clock(clock))
    assert site.ask(instruct()).header.status == "trained"
    for off, code in (("-1d", "clock"), ("+12h", "outside_hours"), ("+30d", "budget_expired")):
        clock.write_text(off)
        refused = site.ask(instruct(round_number=2))
        assert (refused.header.status, refused.header.code) == ("refused", code), site.text()
        assert not refused.tensors
        assert site.kinds() == ["reserve", "commit"], "nothing was spent"
    clock.write_text("+0d")
    assert site.ask(instruct(round_number=2)).header.status == "trained", site.text()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=600k,mode=0700", "tmpfs", str(folder))
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(("umount", "-l", str(folder)), check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))


def test_a_full_disk_is_refused_before_training(make_site: Make, instruct: Instruct, tiny_disk: Path) -> None:
    site = make_site(serve={"min_free_mib": 0}, state_directory=str(tiny_disk / "s"))
    site.state, site.socket = tiny_disk / "s", tiny_disk / "s" / "run" / "site.sock"
    site.start()
    assert site.ask(instruct()).header.status == "trained"
    spent = site.kinds()
    fill(tiny_disk / "filler")
    reply = site.ask(instruct(round_number=2))
    assert (reply.header.status, reply.header.code) == ("refused", "ledger_unusable"), site.text()
    assert not reply.tensors

    (tiny_disk / "filler").unlink()
    assert site.kinds()[: len(spent)] == spent, "nothing was lost"
    after = site.ask(instruct(round_number=2))
    assert after.header.status == "trained", site.text()
    assert after.header.privacy is not None
    assert after.header.privacy.steps_executed >= 4
