"""`cloister ledger`: what a site has spent, whether its record of that is whole, and what it may still spend."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.outputs import FIGURES, check_output
from cli.paths import at_home, expanded_path

if TYPE_CHECKING:
    from privacy.ledger.budget import Budget
    from privacy.ledger.store import Snapshot
    from privacy.ledger.verification import Verification

__all__ = ["app"]

app = typer.Typer(help="What a site has spent, and whether its record of that is whole.", no_args_is_help=True)

SiteOption = Annotated[Path | None, typer.Option("--site", callback=at_home, help="the site's own file (YAML)")]
LedgerOption = Annotated[
    str | None, typer.Option("--ledger", help="a ledger's path, or postgresql+psycopg://user@host/database")
]
KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--keys", callback=at_home, help="the folder of ledger.key and ledger.pub; default: beside the ledger"
    ),
]
PublicKeyOption = Annotated[
    Path | None,
    typer.Option("--public-key", callback=at_home, help="the site's ledger.pub, as the site handed it over"),
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        "--head",
        help="a hash noted earlier: shows whether entries were cut off since; default: the keys' ledger.head",
    ),
]


class Format(StrEnum):
    """How an export is written."""

    JSON = "json"
    HTML = "html"


@dataclass(frozen=True)
class _Place:
    """Where a ledger and its keys are."""

    location: str | Path
    keys: Path | None
    budget: Budget | None = None
    """The site file's."""


@app.command()
def show(
    site: SiteOption = None,
    ledger: LedgerOption = None,
    plot: Annotated[
        Path | None, typer.Option(callback=at_home, help="draw the burn-down as .png, .svg or .pdf")
    ] = None,
    last: Annotated[int, typer.Option(min=0, help="entries to list, the latest")] = 20,
) -> None:
    """Print budget, spending per run, burn-down, and the latest entries."""
    from rich.console import Console

    from cli.ledger_views import burn_down_figure, entries_table, spending_views
    from privacy.ledger.summary import summarize
    from privacy.ledger.verification import structural_problems
    from protocol.errors import PrivacyError

    if plot is not None:
        check_output(plot, FIGURES, "--plot")
    place = _place(site, ledger, None)
    snapshot = _read(place)
    for problem in structural_problems(snapshot, key=None):
        raise PrivacyError(f"the ledger at {place.location} does not hold: {problem.text}; run: cloister ledger verify")
    summary = summarize(snapshot)
    console = Console(highlight=False)
    for view in spending_views(summary):
        console.print(view)
    if last:
        console.print(entries_table(snapshot.entries[-last:], len(snapshot.entries)))
    console.print(f"head     {summary.head}", soft_wrap=True)
    if plot is not None:
        burn_down_figure(summary).savefig(plot, bbox_inches="tight", dpi=160)
        console.print(f"plot     {plot}", soft_wrap=True)


@app.command()
def verify(
    site: SiteOption = None,
    ledger: LedgerOption = None,
    keys: KeysOption = None,
    public_key: PublicKeyOption = None,
    head: HeadOption = None,
) -> None:
    """Check every hash and signature, recompute every ε; the first problem is named, and makes the command fail."""
    from rich.console import Console

    from cli.ledger_views import verification_lines
    from protocol.errors import PrivacyError

    place = _place(site, ledger, keys)
    found = _verified(place, _read(place), public_key, head)
    if not found.holds:
        more = len(found.problems) - 1
        further = f" ({more} further problem(s): see cloister ledger export)" if more else ""
        raise PrivacyError(f"the ledger at {place.location} does not hold: {found.problems[0].text}{further}")
    console = Console(highlight=False)
    for line in verification_lines(found):
        console.print(line, soft_wrap=True)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(callback=at_home, help="the file to write")],
    site: SiteOption = None,
    ledger: LedgerOption = None,
    keys: KeysOption = None,
    public_key: PublicKeyOption = None,
    head: HeadOption = None,
    format: Annotated[Format, typer.Option(help="json for programs, html for people")] = Format.HTML,
) -> None:
    """Write everything an auditor needs into one file; a ledger with problems is exported with them."""
    from rich.console import Console

    from cli.ledger_export import as_html, as_json
    from protocol.errors import ConfigError

    check_output(output)
    place = _place(site, ledger, keys)
    snapshot = _read(place)
    found = _verified(place, snapshot, public_key, head)
    text = as_json(snapshot, found) if format is Format.JSON else as_html(snapshot, found)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror}; free the disk or name another place"
        ) from error
    Console(highlight=False).print(f"export   {output}", soft_wrap=True)


@app.command()
def init(
    site: SiteOption = None,
    ledger: LedgerOption = None,
    keys: KeysOption = None,
    epsilon: Annotated[float | None, typer.Option(help="default: the site file's")] = None,
    delta: Annotated[float | None, typer.Option(help="default: the site file's")] = None,
    unit: Annotated[str | None, typer.Option(help="record or user; default: the site file's, or record")] = None,
    reason: Annotated[str, typer.Option(help="why this budget; stays in the ledger")] = "cloister ledger init",
) -> None:
    """Make the site's keys and its ledger, with the first budget."""
    from rich.console import Console

    from privacy.ledger.budget import Budget
    from privacy.ledger.journal import Journal
    from privacy.ledger.keys import head_file, load_or_create_keys
    from protocol.errors import ConfigError, PrivacyError

    place = _place(site, ledger, keys)
    if place.budget is not None:
        epsilon = place.budget.epsilon if epsilon is None else epsilon
        delta = place.budget.delta if delta is None else delta
        unit = place.budget.unit if unit is None else unit
    if epsilon is None or delta is None:
        raise ConfigError("a new ledger needs a budget: add --epsilon and --delta, or a budget in the site file")
    budget = Budget(epsilon, delta, unit or "record")
    folder = _keys_folder(place)
    journal = Journal(place.location, load_or_create_keys(folder).signing, head_file=head_file(folder, place.location))
    try:
        with journal.reading() as (_, entries):
            if entries:
                raise PrivacyError(
                    f"the ledger at {place.location} exists and has {len(entries)} entries; to change its budget: "
                    "cloister ledger set-budget"
                )
        entry = journal.set_budget(budget, reason)
    finally:
        journal.close()
    console = Console(highlight=False)
    console.print(f"keys     {folder}: back them up; without them the ledger cannot go on", soft_wrap=True)
    console.print(f"budget   ε={budget.epsilon:g} at δ={budget.delta:.3g}, per {budget.unit}")
    console.print(f"head     {entry.hash}", soft_wrap=True)


@app.command("set-budget")
def set_budget(
    epsilon: Annotated[float, typer.Option(help="the most one unit may ever cost, over all runs")],
    site: SiteOption = None,
    ledger: LedgerOption = None,
    keys: KeysOption = None,
    delta: Annotated[float | None, typer.Option(help="default: as it is")] = None,
    unit: Annotated[str | None, typer.Option(help="default: as it is; fixed once something is booked")] = None,
    reason: Annotated[str, typer.Option(help="stays in the ledger; needed to raise the budget")] = "",
) -> None:
    """Lower the budget at once, or raise it with a reason; either is an entry."""
    from rich.console import Console

    from privacy.ledger.budget import Budget, stored_budget
    from privacy.ledger.journal import Journal
    from privacy.ledger.keys import head_file, load_or_create_keys
    from protocol.errors import PrivacyError

    place = _place(site, ledger, keys)
    old = stored_budget(_read(place).entries)
    if old is None:
        raise PrivacyError(f"the ledger at {place.location} has no budget yet; run: cloister ledger init")
    new = Budget(epsilon, old.delta if delta is None else delta, old.unit if unit is None else unit)
    folder = _keys_folder(place)
    journal = Journal(place.location, load_or_create_keys(folder).signing, head_file=head_file(folder, place.location))
    try:
        entry = journal.set_budget(new, reason)
    finally:
        journal.close()
    console = Console(highlight=False)
    console.print(f"budget   ε={old.epsilon:g} → {new.epsilon:g} at δ={new.delta:.3g}, per {new.unit}")
    if place.budget is not None and place.budget.epsilon < new.epsilon:
        console.print(f"[yellow]warning[/yellow] the site file's ε={place.budget.epsilon:g} is smaller, and holds")
    console.print(f"head     {entry.hash}", soft_wrap=True)


def _place(site: Path | None, ledger: str | None, keys: Path | None) -> _Place:
    from protocol.errors import ConfigError

    if (site is None) == (ledger is None):
        raise ConfigError("name one ledger: either --site site.yaml or --ledger PATH_OR_URL")
    if ledger is not None:
        location = expanded_path(ledger)
        return _Place(location, keys or (None if "://" in location else Path(location).parent))
    assert site is not None
    from client.site import read_site_file
    from privacy.ledger.budget import Budget

    file = read_site_file(site)
    folder = Path(file.state_directory)
    budget = None if file.budget is None else Budget(file.budget.epsilon, file.budget.delta, file.budget.unit)
    return _Place(file.ledger or folder / "ledger.db", keys or folder, budget)


def _keys_folder(place: _Place) -> Path:
    from protocol.errors import ConfigError

    if place.keys is None:
        raise ConfigError("a ledger at a URL has its keys elsewhere: add --keys FOLDER")
    return place.keys


def _read(place: _Place) -> Snapshot:
    from privacy.ledger.store import read_snapshot

    return read_snapshot(place.location)


def _verified(place: _Place, snapshot: Snapshot, public_key: Path | None, head: str | None) -> Verification:
    from privacy.ledger.keys import PUBLIC_KEY_FILE, head_file, load_verifying_key
    from privacy.ledger.verification import verify as check

    if head is None and place.keys is not None and (noted := head_file(place.keys, place.location)).is_file():
        head = noted.read_text(errors="replace").strip()
    return check(snapshot, load_verifying_key(public_key or _keys_folder(place) / PUBLIC_KEY_FILE), head)
