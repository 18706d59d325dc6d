"""A ledger for an auditor: everything in one file, as data or as a page that loads nothing."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cli.ledger_views import burn_down_figure, entry_summary
from cli.tables import delta_text, epsilon_text
from privacy.ledger.store import Snapshot
from privacy.ledger.summary import LedgerSummary, summarize
from privacy.ledger.verification import Verification

__all__ = ["as_html", "as_json"]

_TEMPLATE = "ledger.html.j2"


def as_json(snapshot: Snapshot, found: Verification) -> str:
    """Return the ledger as JSON. Entries keep every stored field, so that hashes and signatures can be checked anew."""
    exported: dict[str, Any] = {
        "format": "cloister ledger export 1",
        "verification": asdict(found) | {"holds": found.holds},
        "summary": asdict(_summary(snapshot, found)),
        "entries": [asdict(entry) for entry in snapshot.entries],
    }
    return json.dumps(exported, indent=1, ensure_ascii=False) + "\n"


def as_html(snapshot: Snapshot, found: Verification) -> str:
    """Return the ledger as one HTML page: verdict, budget, burn-down, figures, every entry, and what it all means."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summary = _summary(snapshot, found)
    return environment.get_template(_TEMPLATE).render(
        summary=summary,
        found=found,
        entries=[(entry, entry_summary(entry)) for entry in snapshot.entries] if _is_legible(found) else [],
        raw=snapshot.entries if not _is_legible(found) else [],
        figure=_svg(summary),
        epsilon=epsilon_text,
        delta=delta_text,
    )


def _is_legible(found: Verification) -> bool:
    """Return whether the entries are what a Cloister wrote; others may hold anything, and are shown as they are."""
    return found.holds or bool(found.figures)


def _summary(snapshot: Snapshot, found: Verification) -> LedgerSummary:
    if _is_legible(found):
        return summarize(snapshot)
    return LedgerSummary(None, None, len(snapshot.entries), found.head, ())


def _svg(summary: LedgerSummary) -> Markup:
    if not summary.data_sets:
        return Markup("")
    drawn = io.StringIO()
    burn_down_figure(summary).savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return Markup(text[text.index("<svg") :])  # drawn here; its only foreign text is hexadecimal
