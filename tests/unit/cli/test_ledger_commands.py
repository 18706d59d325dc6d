"""`cloister ledger` on real files: what it prints, what it refuses, and its exit codes."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from privacy.identity import identify
from privacy.ledger import Booking, Budget, Ledger, head_file, load_or_create_keys
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import ConfigError, PrivacyError

CLOISTER = Path(sys.executable).parent / "cloister"
STEP = SubsampledGaussian(0.05, 1.0, 10)


def run(*arguments: str | Path) -> Result:
    """Return what a command that succeeds prints."""
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["ledger", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def refusal(*arguments: str | Path) -> BaseException:
    result = CliRunner().invoke(app, ["ledger", *map(str, arguments)])
    assert result.exception is not None
    return result.exception


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger with two runs; the second crashed."""
    key = load_or_create_keys(tmp_path).signing
    people = identify((f"person {number}".encode() for number in range(50)), b"k" * 32)
    opened = Ledger(tmp_path / "ledger.db", key, people, Budget(5.0, 1e-5))
    for number in (1, 2):
        reservation = opened.reserve(Booking("spring", number, "plan", STEP.repeated(40), STEP, f"inputs {number}"))
        opened.commit(reservation, f"output {number}")
    opened.reserve(Booking("<b>autumn</b>", 1, "plan", STEP.repeated(40), STEP, "inputs 3"))
    opened.close()
    return tmp_path / "ledger.db"


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(
        "name: harbor\npublished_records: 100\nmodel_path: model\n"
        "data: {source: {path: none.jsonl}, columns: {kind: text, text: text}}\n"
        f"budget: {{epsilon: 3.0, delta: 1.0e-5}}\nstate_directory: {tmp_path / 'state'}\n"
    )
    return path


def test_init_makes_keys_and_the_first_budget_and_does_it_once(site_file: Path, tmp_path: Path) -> None:
    shown = run("init", "--site", site_file).output
    assert "budget   ε=3 at δ=1e-05, per record" in shown
    assert {path.name for path in (tmp_path / "state").iterdir()} >= {"ledger.db", "ledger.key", "ledger.pub"}
    assert re.search(r"head     [0-9a-f]{64}", shown)
    error = refusal("init", "--site", site_file)
    assert isinstance(error, PrivacyError)
    assert "exists and has 1 entries; to change its budget: cloister ledger set-budget" in str(error)
    assert "nothing is booked" in run("show", "--site", site_file).output


def test_init_without_a_site_file_needs_a_budget(tmp_path: Path) -> None:
    error = refusal("init", "--ledger", tmp_path / "ledger.db")
    assert isinstance(error, ConfigError)
    assert "a new ledger needs a budget: add --epsilon and --delta, or a budget in the site file" in str(error)
    shown = run("init", "--ledger", tmp_path / "ledger.db", "--epsilon", 2, "--delta", 1e-6, "--unit", "user").output
    assert "ε=2 at δ=1e-06, per user" in shown


def test_a_ledger_must_be_named_once(tmp_path: Path, site_file: Path) -> None:
    for both in ([], ["--site", site_file, "--ledger", "x"]):
        assert "name one ledger: either --site site.yaml or --ledger PATH_OR_URL" in str(refusal("show", *both))
    assert "there is no ledger at" in str(refusal("show", "--site", site_file))
    url = "postgresql://nobody@/none?host=/nowhere"
    error = refusal("init", "--ledger", url, "--epsilon", 1, "--delta", 1e-5)
    assert "a ledger at a URL has its keys elsewhere: add --keys FOLDER" in str(error)


def test_set_budget_lowers_at_once_and_raises_with_a_reason(site_file: Path, ledger: Path) -> None:
    assert "ε=5 → 4" in run("set-budget", "--ledger", ledger, "--epsilon", 4).output
    error = refusal("set-budget", "--ledger", ledger, "--epsilon", 6)
    assert isinstance(error, PrivacyError)
    assert "needs a reason" in str(error)
    run("set-budget", "--ledger", ledger, "--epsilon", 6, "--reason", "ethics board")
    assert "ethics board" in run("show", "--ledger", ledger).output
    run("init", "--site", site_file)
    shown = run("set-budget", "--site", site_file, "--epsilon", 4, "--reason", "more").output
    assert "the site file's ε=3 is smaller, and holds" in shown


def test_set_budget_needs_a_ledger_with_one(tmp_path: Path) -> None:
    from privacy.ledger.store import Store

    Store(tmp_path / "ledger.db").close()
    error = refusal("set-budget", "--ledger", tmp_path / "ledger.db", "--epsilon", 4)
    assert "has no budget yet; run: cloister ledger init" in str(error)
    assert "no budget yet" in run("show", "--ledger", tmp_path / "ledger.db").output


def test_show_tells_budget_spending_runs_and_entries(ledger: Path, tmp_path: Path) -> None:
    shown = run("show", "--ledger", ledger, "--plot", tmp_path / "burn.png").output
    assert "budget   ε=5 at δ=1e-05, per record, over all runs" in shown
    assert "spent (Rényi filter)" in shown
    assert re.search(r"spring +│ +2 │ +│ +20 │", shown)
    assert re.search(r"autumn</b> +│ +1 │ +1 │ +10 │", shown)
    assert "run spring, round 2: 10 steps, q=0.05, σ=1 → ε=" in shown
    assert "█" in shown
    assert (tmp_path / "burn.png").read_bytes().startswith(b"\x89PNG")


def test_show_refuses_what_was_tampered_with(ledger: Path) -> None:
    with sqlite3.connect(ledger) as connection:
        connection.execute("UPDATE entries SET at = 'x' WHERE sequence = 3")
    assert "does not hold: entry 3 was altered" in str(refusal("show", "--ledger", ledger))


def test_verify_passes_and_prints_the_head(ledger: Path, tmp_path: Path) -> None:
    shown = run("verify", "--ledger", ledger).output
    assert "8 entries hold" in shown
    assert "3 stated ε recomputed" in shown
    head = re.search(r"head     ([0-9a-f]{64})", shown)
    assert head is not None
    run("verify", "--ledger", ledger, "--head", head[1][:16], "--public-key", tmp_path / "ledger.pub")
    assert "no entry has the hash ffff" in str(refusal("verify", "--ledger", ledger, "--head", "f" * 64))


def test_verify_fails_as_a_process_and_names_the_first_problem(ledger: Path) -> None:
    with sqlite3.connect(ledger) as connection:
        connection.execute("DELETE FROM entries WHERE sequence = 4")
    result = subprocess.run(
        [sys.executable, "-c", "from cli.main import main; main()", "ledger", "verify", "--ledger", str(ledger)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )
    assert result.returncode == PrivacyError.exit_code
    assert "does not hold: entry 4 is missing: entry 5 stands in its place" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kept", [3, 0])
def test_verify_notices_a_cut_end_by_the_head_beside_the_keys(tmp_path: Path, kept: int) -> None:
    """Every hash and signature of what is left holds; also of the ledger of the whole site, which has its own head."""
    keys = load_or_create_keys(tmp_path)
    for name in ("ledger.db", "site_ledger.db"):
        location = tmp_path / name
        people = identify([b"one"], keys.secret)
        head = head_file(tmp_path, location)
        opened = Ledger(location, keys.signing, people, Budget(5.0, 1e-5), head_file=head)
        opened.commit(opened.reserve(Booking("spring", 1, "plan", STEP.repeated(40), STEP, "inputs")), "output")
        opened.close()
        assert head.is_file()
        assert "4 entries" in run("verify", "--ledger", location).output
    for name in ("ledger.db", "site_ledger.db"):
        with sqlite3.connect(tmp_path / name) as connection:
            connection.execute("DELETE FROM entries WHERE sequence > ?", (kept,))
            if not kept:
                connection.execute("DELETE FROM data_sets")
        error = refusal("verify", "--ledger", tmp_path / name)
        assert isinstance(error, PrivacyError)
        assert "that was noted: entries were cut off at the end, or all were rewritten" in str(error)


def test_a_full_disk_is_no_traceback(ledger: Path) -> None:
    error = refusal("export", "/dev/full", "--ledger", ledger)
    assert isinstance(error, ConfigError)
    assert "/dev/full cannot be written: No space left on device" in str(error)


def test_a_url_that_is_none_is_refused() -> None:
    error = refusal("show", "--ledger", "postgresql://h:port/x")
    assert isinstance(error, PrivacyError)
    assert "the ledger's URL cannot be read" in str(error)


def test_export_as_json_can_be_checked_by_other_programs(ledger: Path, tmp_path: Path) -> None:
    import hashlib

    run("export", tmp_path / "out.json", "--ledger", ledger, "--format", "json")
    exported = json.loads((tmp_path / "out.json").read_text())
    assert exported["verification"]["holds"] is True
    assert exported["summary"]["budget"] == {"epsilon": 5.0, "delta": 1e-5, "unit": "record"}
    for entry in exported["entries"]:
        covered = {name: value for name, value in entry.items() if name not in ("hash", "signature")}
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == entry["hash"]


def test_export_as_a_page_loads_nothing_and_escapes_names(ledger: Path, tmp_path: Path) -> None:
    run("export", tmp_path / "out.html", "--ledger", ledger)
    page = (tmp_path / "out.html").read_text()
    assert "The ledger holds." in page
    assert "<svg" in page
    assert "&lt;b&gt;autumn&lt;/b&gt;" in page
    assert "<b>autumn" not in page
    assert not re.search(r"<script|<link|src=|@import|url\((?!#)", page)


def _of_people(folder: Path, count: int, unit: str) -> Path:
    keys = load_or_create_keys(folder)
    people = identify((f"person {number}".encode() for number in range(count)), b"k" * 32)
    opened = Ledger(folder / "ledger.db", keys.signing, people, Budget(5.0, 1e-5, unit))
    opened.commit(opened.reserve(Booking("spring", 1, "plan", STEP.repeated(40), STEP, "inputs")), "output")
    opened.close()
    return folder / "ledger.db"


def test_an_export_tells_nobody_how_many_units_there_are(tmp_path: Path) -> None:
    """No ε covers the count: pages of two data sets differ in hashes and times alone."""
    pages: list[list[str]] = []
    for count in (77, 4321):
        folder = tmp_path / str(count)
        folder.mkdir()
        location = _of_people(folder, count, "record")
        for name, form in (("out.json", "json"), ("out.html", "html")):
            run("export", folder / name, "--ledger", location, "--format", form)
        written = [(folder / name).read_text() for name in ("out.json", "out.html")]
        shown = run("show", "--ledger", location).output
        assert set(json.loads(written[0])["summary"]["data_sets"][0]) == {
            *("fingerprint", "shares_units_with", "spent", "left", "runs", "points")
        }
        varies = r"[0-9a-f]{8,}|\d{4}-\d\d-\d\d[T0-9:.+-]*"
        pages.append([re.sub(varies, "", text.split("<svg")[0] + text.split("</svg>")[-1]) for text in written])
        assert not re.search(r"\b(77|4321|4,321)\b", re.sub(varies, "", shown))
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("unit", "relation"),
    [
        ("record", "add or remove one record of a site, in one of its published slots"),
        ("user", "add or remove one user of a site, with all of the user's records, in one of its published slots"),
        ("site", "add or remove all updates of one enrolled site"),
    ],
)
def test_a_ledger_states_the_relation_of_its_unit(tmp_path: Path, unit: str, relation: str) -> None:
    location = _of_people(tmp_path, 3, unit)
    run("export", tmp_path / "out.html", "--ledger", location)
    run("export", tmp_path / "out.json", "--ledger", location, "--format", "json")
    assert relation in (tmp_path / "out.html").read_text().replace("&#39;", "'")
    assert json.loads((tmp_path / "out.json").read_text())["summary"]["relation"] == relation
    assert relation in run("show", "--ledger", location).output


def test_a_broken_ledger_is_exported_with_its_problem(ledger: Path, tmp_path: Path) -> None:
    with sqlite3.connect(ledger) as connection:
        connection.execute("UPDATE entries SET payload = '<script>' WHERE sequence = 3")
    run("export", tmp_path / "out.html", "--ledger", ledger)
    run("export", tmp_path / "out.json", "--ledger", ledger, "--format", "json")
    page = (tmp_path / "out.html").read_text()
    assert "The ledger does not hold." in page
    assert "entry 3 was altered" in page
    assert "&lt;script&gt;" in page
    assert json.loads((tmp_path / "out.json").read_text())["verification"]["problems"][0]["sequence"] == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("export", "none/out.html"), "is in a folder that does not exist; run: mkdir -p .*none"),
        (("export", "."), "is a folder; name a file in it"),
        (("show", "--plot", "x.txt"), "--plot .*x.txt ends in '.txt'; use one of .png, .svg, .pdf"),
        (("show", "--plot", "none/x.png"), "is in a folder that does not exist"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(
    ledger: Path, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    *options, name = arguments
    error = refusal(*options, tmp_path / name, "--ledger", ledger)
    assert isinstance(error, ConfigError)
    assert re.search(text, str(error))


def test_every_command_says_what_is_wrong_with_a_damaged_ledger(ledger: Path, tmp_path: Path) -> None:
    ledger.write_bytes(ledger.read_bytes()[:5000])
    for command in (("show",), ("verify",), ("export", tmp_path / "out.html"), ("set-budget", "--epsilon", 1)):
        error = refusal(*command, "--ledger", ledger)
        assert isinstance(error, PrivacyError)
        assert re.search(r"the ledger at .* (is damaged|cannot be \w+): .*restore a backup", str(error))


def test_a_copy_without_keys_is_shown_and_asks_for_the_public_key(ledger: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "ledger.db"
    copy.write_bytes(ledger.read_bytes())
    copy.chmod(0o444)
    run("show", "--ledger", copy)
    run("verify", "--ledger", copy, "--public-key", tmp_path / "ledger.pub")
    error = refusal("verify", "--ledger", copy)
    assert "the public key" in str(error)
    assert "name it with --public-key" in str(error)
    assert [path.name for path in copy.parent.iterdir()] == ["ledger.db"]


def test_figures_are_whole_at_80_columns(ledger: Path) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["ledger", "show", "--ledger", str(ledger)])
    assert result.exit_code == 0
    assert "…" not in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
