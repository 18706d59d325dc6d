"""What surrounds a round at a served site: approval, hours, expiry, clock, disk, and the stored replies."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from client.approvals import Approvals
from client.check import check_site
from client.desk import ANSWER, Desk
from client.health import check_books
from client.replies import ReplyStore
from client.site import Site
from conf.schema.site import SiteBudget, SiteFile, WholeSiteBudget, WorkingHours
from privacy.ledger import SITE_LEDGER_FILE, Budget, head_file, load_or_create_keys
from privacy.ledger.journal import Journal
from protocol.errors import ConfigError, SiteRefusal
from protocol.frames import decode_frame, encode_frame
from protocol.instructions import Instruction, ReleaseClaim, Reply
from protocol.records import instruction_to_record, record_to_reply
from protocol.refusals import REFUSALS

Make = Callable[..., Any]
SlowDesk = tuple[Desk, threading.Event, threading.Event]
NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
"""A Monday, long before any ledger of these tests is written."""


@pytest.fixture
def desk_of(make_site: Make, small: Make) -> Make:
    """A desk over a simulated site's file with some sections replaced, at a given time."""

    def make(at: datetime | None = None, **sections: Any) -> tuple[Desk, Site]:
        now = at or datetime.now(UTC)
        site = make_site(small())
        policy = site.file.policy.model_copy(update=sections.pop("policy", {}))
        changed = site.file.model_copy(update={"policy": policy, **sections})
        opened = Site(changed, rows=site._read, simulated=True)
        return Desk(opened, lambda: now), opened

    return make


def ask(desk: Desk, instruction: Instruction) -> Reply:
    kind, record = decode_frame(desk.answer(encode_frame("train", instruction_to_record(instruction))))
    assert kind == ANSWER
    return record_to_reply(record)


def code(reply: Reply) -> str:
    assert reply.header.reason == (REFUSALS[reply.header.code].told if reply.header.code else "")
    return reply.header.code


def test_a_site_without_a_policy_refuses_everything(desk_of: Make, small: Make, instruct: Make) -> None:
    _, site = desk_of()
    desk = Desk(Site(site.file.model_copy(update={"policy": None})), lambda: NOW)
    assert code(ask(desk, instruct(small()))) == "no_policy"


def test_a_new_experiment_waits_for_somebodys_approval(
    desk_of: Make, small: Make, instruct: Make, tmp_path: Path
) -> None:
    desk, site = desk_of(policy={"require_approval": True})
    asked = instruct(small())
    assert code(ask(desk, asked)) == "not_approved"
    approvals = Approvals(Path(site.file.state_directory) / "approvals", lambda: NOW)
    (waiting,) = approvals.all()
    assert (waiting.digest, waiting.state, waiting.plan["run"]) == (asked.header.plan.digest, "pending", "run")

    approvals.decide(waiting.digest[:8], "approved")
    assert ask(desk, asked).header.status == "trained"
    assert code(ask(desk, instruct(small(), run="other"))) == "not_approved", "each experiment anew"
    approvals.decide(waiting.digest, "revoked")
    assert code(ask(desk, asked)) == "not_approved", "also what was answered before"


def test_approvals_take_whole_digests_and_unambiguous_ones(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path / "approvals", lambda: NOW)
    assert approvals.decide("a" * 64, "approved").plan == {}
    approvals.check("a" * 64, {"run": "x"})
    for wrong in ("abc", "../../../etc/passwd", "A" * 64):
        with pytest.raises(ConfigError, match="is no digest; give 8 to 64"):
            approvals.decide(wrong, "approved")
    with pytest.raises(ConfigError, match="0 experiments start with bbbbbbbb"):
        approvals.decide("b" * 8, "approved")
    approvals.decide("a" * 63 + "b", "approved")
    with pytest.raises(ConfigError, match="2 experiments start with aaaaaaaa"):
        approvals.decide("a" * 8, "revoked")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"x"'])
def test_a_damaged_decision_approves_nothing_and_is_named(tmp_path: Path, content: str) -> None:
    approvals = Approvals(tmp_path, lambda: NOW)
    approvals.decide("a" * 64, "approved")
    (tmp_path / f"{'a' * 64}.json").write_text(content)
    with pytest.raises(ConfigError, match=r"aaaa\.json is damaged .*; delete it, and decide about its"):
        approvals.check("a" * 64, {"run": "x"})


def test_a_server_that_invents_plans_does_not_fill_the_disk(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path, lambda: NOW)
    for number in range(130):
        with pytest.raises(SiteRefusal, match="is not approved"):
            approvals.check(f"{number:064x}", {})
    assert len(approvals.all()) == 100


def test_invented_plans_do_not_keep_a_later_one_out(tmp_path: Path) -> None:
    times = iter(NOW + timedelta(seconds=number) for number in range(1000))
    approvals = Approvals(tmp_path, lambda: next(times))
    approvals.decide("a" * 64, "approved")
    for number in range(101):
        with pytest.raises(SiteRefusal, match="is not approved"):
            approvals.check(f"{number:064x}", {})
    known = {asked.digest: asked.state for asked in approvals.all()}
    assert known["a" * 64] == "approved"
    assert f"{100:064x}" in known
    assert f"{0:064x}" not in known, "the oldest that waited"
    assert len(known) == 101


def test_hours_expiry_clock_and_disk(desk_of: Make, small: Make, instruct: Make) -> None:
    asked = instruct(small())
    nights = WorkingHours(timezone="Europe/Berlin", start="20:00", end="06:00")  # type: ignore[arg-type]
    assert code(ask(desk_of(NOW, policy={"hours": nights})[0], asked)) == "outside_hours"
    expired = SiteBudget(epsilon=8, delta=1e-3, expires=date(2026, 3, 1))
    assert code(ask(desk_of(NOW, budget=expired)[0], asked)) == "budget_expired"

    _, site = desk_of()
    full = site.file.model_copy(update={"serve": site.file.serve.model_copy(update={"min_free_mib": 10**9})})
    Path(full.state_directory).mkdir(parents=True, exist_ok=True)
    assert code(ask(Desk(Site(full, simulated=True), lambda: NOW), asked)) == "no_space"

    desk, site = desk_of(datetime.now(UTC))
    assert ask(desk, asked).header.status == "trained"
    spent = site.state.spent()
    back = Desk(site, lambda: datetime.now(UTC) - timedelta(hours=1))
    assert code(ask(back, instruct(small(), 2))) == "clock"
    assert site.state.spent() == spent


@pytest.mark.parametrize("known_by", ["the ledger", "its head"])
def test_a_clock_set_back_revives_no_expired_budget_of_the_whole_site(
    desk_of: Make, small: Make, instruct: Make, known_by: str
) -> None:
    """A site that takes part in client-level runs alone has no ledger of records to compare the clock with."""
    budget = WholeSiteBudget(epsilon=8, delta=1e-3, expires=date(2026, 2, 28))
    _, site = desk_of()
    march = site.file.model_copy(update={"site_budget": budget})
    folder = Path(march.state_directory)
    book_whole_site(march, NOW)
    assert not (folder / "ledger.db").exists()
    assert check_books(march, NOW) == 1
    if known_by == "its head":
        (folder / "site_ledger.db").unlink()
    client_level = small("privacy=client_level", "privacy.insecure_seed=null", private=False)
    asked = instruct(client_level, release=ReleaseClaim(noise_multiplier=2, sampling_rate=1.0, delta=1e-3))
    january = datetime(2026, 1, 5, tzinfo=UTC)
    desk = Desk(Site(march, rows=site._read, simulated=True), lambda: january)
    assert code(ask(desk, asked)) == ("clock" if known_by == "the ledger" else "ledger_unusable")
    assert code(ask(Desk(Site(march, simulated=True), lambda: NOW), asked)) == "budget_expired"
    books, budgets = (
        next(each for each in check_site(march, january) if each.name == name)
        for name in ("ledger and clock", "budget")
    )
    assert books.passed is False
    assert ("the ledger (whole site) is of 2026-03-02" in books.detail) == (known_by == "the ledger")
    assert budgets.passed
    expired = next(each for each in check_site(march, NOW) if each.name == "budget")
    assert (expired.passed, expired.detail) == (False, "site_budget expired on 2026-02-28")


def book_whole_site(file: SiteFile, at: datetime) -> None:
    """Write the budget's entry into the ledger of the whole site, at a time."""
    assert file.site_budget is not None
    folder = Path(file.state_directory)
    where = folder / SITE_LEDGER_FILE
    journal = Journal(where, load_or_create_keys(folder).signing, lambda: at, head_file(folder, where))
    journal.set_budget(Budget(file.site_budget.epsilon, file.site_budget.delta, "site"), "")
    journal.close()


def test_a_stored_reply_costs_nothing_and_another_question_is_refused(
    desk_of: Make, small: Make, instruct: Make, caplog: pytest.LogCaptureFixture
) -> None:
    desk, site = desk_of()
    first = ask(desk, instruct(small()))
    (stored,) = (Path(site.file.state_directory) / "replies").iterdir()
    again = ask(desk, instruct(small()))
    assert first.header == again.header
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    nudged = {name: tensor + 1 for name, tensor in instruct(small()).tensors.items()}
    base = instruct(small())
    other = instruct(small(), adapter={**full_adapter(small, instruct), **nudged})
    assert other.header.adapter_digest != base.header.adapter_digest
    assert code(ask(desk, other)) == "replay_mismatch"

    assert code(ask(desk, reminded(instruct(small()), "f" * 64))) == "", "what was stored is sent whatever is reminded"
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    repeated = ask(desk, instruct(small()))
    assert "is damaged; the round is executed again" in caplog.text
    assert repeated.header == first.header, "the same noise, and no further cost"


def test_an_answer_made_under_another_budget_is_not_sent_again(
    desk_of: Make, small: Make, instruct: Make, caplog: pytest.LogCaptureFixture
) -> None:
    desk, site = desk_of()
    first = ask(desk, instruct(small()))
    site.close()

    def again(**sections: Any) -> Reply:
        changed = Site(site.file.model_copy(update=sections), rows=site._read, simulated=True)
        reply = ask(Desk(changed, lambda: datetime.now(UTC)), instruct(small()))
        changed.close()
        return reply

    assert site.file.policy is not None
    stricter = site.file.policy.model_copy(update={"min_noise_multiplier": 900.0})
    assert code(again(policy=stricter)) == "noise_too_small"
    assert "was made under another policy or budget" in caplog.text
    repeated = again(policy=site.file.policy.model_copy(update={"max_rounds": 999}))
    assert repeated.header == first.header, "allowed, so it is executed again with the same noise, and costs nothing"


def reminded(instruction: Instruction, head: str) -> Instruction:
    header = instruction.header.model_copy(update={"ledger_heads": {"records": head}})
    return replace(instruction, header=header)


def full_adapter(small: Make, instruct: Make) -> dict[str, Any]:
    from finetuning.adapters import attach
    from finetuning.models import load_base

    experiment = small()
    adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
    return dict(adapted.initial(experiment.seed))


def test_old_replies_are_removed_by_number_and_by_age(tmp_path: Path, instruct: Make, small: Make) -> None:
    now = [datetime.now(UTC).timestamp()]
    store = ReplyStore(tmp_path, terms="", keep=2, keep_s=60, clock=lambda: now[0])
    headers = [instruct(small("federation.rounds=9"), number).header for number in range(1, 5)]
    for header in headers[:3]:
        store.put(header, b"body")
    assert len(list(tmp_path.iterdir())) == 2
    now[0] += 120
    store.put(headers[3], b"new")
    assert store.find(headers[2]) is None
    assert not list(tmp_path.iterdir()), "younger than the clock of the store says, so it went too"


def test_what_a_killed_process_left_of_a_reply_is_removed(tmp_path: Path, instruct: Make, small: Make) -> None:
    header = instruct(small()).header
    for _ in range(2):
        store = ReplyStore(tmp_path, terms="", keep=2, keep_s=60, clock=lambda: 0.0)
        assert not list(tmp_path.glob(".*"))
        store.put(header, b"body")
        (tmp_path / ".x1y2").write_bytes(b"half")
    assert store.find(header) == b"body"


def test_a_disk_that_is_full_does_not_lose_an_answer(
    tmp_path: Path, instruct: Make, small: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store = ReplyStore(tmp_path / "replies", terms="", keep=2, keep_s=60, clock=lambda: 0.0)
    (tmp_path / "replies").rmdir()
    store.put(instruct(small()).header, b"body")
    assert "the reply could not be stored" in caplog.text


@pytest.fixture
def slow_desk(desk_of: Make) -> SlowDesk:
    """A desk whose work tells that it began, and goes on when it is told."""
    desk, site = desk_of()
    began, go_on, handle = threading.Event(), threading.Event(), site.handle

    def slow(instruction: Instruction) -> Reply:
        began.set()
        assert go_on.wait(600)
        return handle(instruction)

    site.handle = slow
    return desk, began, go_on


@pytest.mark.parametrize("heads", [{}, {"site": "0" * 64}], ids=["word for word", "with other notices"])
def test_the_same_question_in_the_middle_of_its_work_waits_for_the_answer(
    heads: dict[str, str], slow_desk: SlowDesk, small: Make, instruct: Make
) -> None:
    """A server that was killed and resumed asks so; `busy` would leave the site out of a round that it paid for."""
    desk, began, go_on = slow_desk
    asked = instruct(small())
    resumed = replace(asked, header=asked.header.model_copy(update={"ledger_heads": heads}))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, desk, asked)
        try:
            assert began.wait(600)
            assert code(ask(desk, instruct(small(), run="other"))) == "busy"
            second = pool.submit(ask, desk, resumed)
            wait([second], timeout=1)  # nothing may come meanwhile
            assert not second.done(), code(second.result())
        finally:
            go_on.set()
        once, again = first.result(600), second.result(600)
    assert once.header.status == "trained"
    assert once.header == again.header, "one training, one charge"
    assert all(torch.equal(once.tensors[name], again.tensors[name]) for name in once.tensors)


def test_whoever_waits_for_an_answer_is_told_of_a_stop(slow_desk: SlowDesk, small: Make, instruct: Make) -> None:
    desk, began, go_on = slow_desk
    with ThreadPoolExecutor(2) as pool:
        pool.submit(ask, desk, instruct(small()))
        assert began.wait(600)
        second = pool.submit(ask, desk, instruct(small()))
        try:
            assert not desk.stop(0.0)
            assert code(second.result(600)) == "stopping"
        finally:
            go_on.set()


def test_a_desk_that_stops_takes_nothing_more(desk_of: Make, small: Make, instruct: Make) -> None:
    desk, _ = desk_of()
    assert desk.stop(0.0)
    assert code(ask(desk, instruct(small()))) == "busy"


def test_neither_garbage_nor_another_kind_breaks_a_desk(desk_of: Make) -> None:
    desk, _ = desk_of()
    for frame in (b"", b"\xff" * 40, encode_frame("train.code", instruction_record())):
        record = decode_frame(desk.answer(frame))[1]
        assert record_to_reply(record).header.code == "malformed_instruction"


def instruction_record() -> Any:
    from flwr.app import RecordDict

    return RecordDict()
