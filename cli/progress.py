"""The live display of a run: a table of sites with a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cli.tables import byte_text, epsilon_text, quality_text
from conf.schema.experiment import Experiment
from server.events import (
    BestKept,
    Evaluated,
    Event,
    PersonalEvaluated,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunResumed,
    RunStarted,
    SiteReplied,
    StoppedEarly,
)

__all__ = ["PlainLines", "RoundsDisplay", "progress_for"]


@contextmanager
def progress_for(experiment: Experiment, console: Console) -> Generator[Callable[[Event], None]]:
    """Show a run's events while the block lasts, the way `logging.progress` asks for."""
    wanted = experiment.logging.progress
    if wanted == "none":
        yield lambda event: None
    elif wanted == "rich" or (wanted == "auto" and console.is_terminal):
        display = RoundsDisplay(experiment.name)
        with Live(display, console=console, refresh_per_second=8) as live:
            display.on_problem = live.console.print
            yield display.observe
    else:
        yield PlainLines(console).observe


@dataclass
class _SiteLine:
    state: str = "waiting"
    epsilon: float | None = None
    budget: float | None = None
    loss: float | None = None
    up: int = 0
    down: int = 0


@dataclass
class RoundsDisplay:
    """A rich renderable that the events update."""

    name: str
    on_problem: Callable[[str], None] = lambda text: None
    _sites: dict[str, _SiteLine] = field(default_factory=dict[str, _SiteLine])
    _quality: str = ""

    def __post_init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._task = self._progress.add_task(f"{self.name}: preparing sites", total=None)
        self._asked = 0
        self._secret = False

    def observe(self, event: Event) -> None:
        """Take one event."""
        match event:
            case RunStarted():
                self._sites = {site: _SiteLine() for site in event.sites}
                self._rounds = event.rounds
                # Replies, not rounds, move the bar: the time left is then known early.
                self._progress.update(self._task, description=self.name, total=event.rounds, completed=0)
            case RunResumed():
                self._sites = {site: _SiteLine() for site in event.sites}
                self._rounds = event.rounds
                self._progress.update(self._task, description=self.name, total=event.rounds, completed=event.round)
            case RoundStarted():
                self._asked = len(event.cohort)
                for site in event.cohort:
                    self._sites[site].state = "training"
            case SiteReplied():
                self._reply(event)
                self._progress.advance(self._task, 1 / max(self._asked, 1))
            case Evaluated():
                self._quality = f"{event.metric} {quality_text(event.metric, event.value)} after round {event.round}"
            case RoundFinished():
                self._secret = event.accepted is None
                self._progress.update(self._task, completed=event.round)
            case RunFinished():
                self._progress.stop()
            case BestKept() | StoppedEarly() | PersonalEvaluated():
                pass  # the live display has ended; the outcome's table tells it

    def _reply(self, event: SiteReplied) -> None:
        line = self._sites[event.site]
        line.state = f"round {event.round} done" if event.accepted else event.code
        line.up, line.down = line.up + event.bytes_up, line.down + event.bytes_down
        line.loss = event.metrics.get("training_loss")
        if event.privacy is not None and event.privacy.delta is not None:
            line.epsilon, line.budget = event.privacy.epsilon_total, event.privacy.epsilon_budget
        if not event.accepted:
            self.on_problem(f"round {event.round}: {event.site} not used: {event.code}, {event.reason}")

    def __rich__(self) -> RenderableType:
        """Return the table of sites over the bar."""
        table = Table(box=None, padding=(0, 2))
        for heading in ("site", "state", "ε spent", "budget", "loss", "sent", "received"):
            table.add_column(heading, justify="left" if heading in ("site", "state") else "right")
        shown = list(self._sites.items())
        for name, line in shown[:20]:
            table.add_row(
                name,
                line.state,
                epsilon_text(line.epsilon),
                epsilon_text(line.budget),
                "withheld" if line.loss is None else f"{line.loss:.3f}",
                byte_text(None if self._secret else line.up),
                byte_text(None if self._secret else line.down),
            )
        if len(shown) > 20:
            table.add_row(f"and {len(shown) - 20} more", "", "", "", "", "", "")
        parts: list[RenderableType] = [table] if shown else []
        return Group(*parts, self._progress, self._quality)


class PlainLines:
    """One line per event worth one, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._print = lambda text: console.print(text, soft_wrap=True, markup=False)
        self._epsilon: dict[str, str] = {}
        self._up = self._down = 0

    def observe(self, event: Event) -> None:
        """Take one event."""
        match event:
            case RunStarted():
                sites = ", ".join(event.sites)
                self._print(f"run {event.run}: {event.rounds} rounds, {len(event.sites)} sites: {sites}")
                self._rounds = event.rounds
            case RunResumed():
                self._print(f"run {event.run}: goes on after round {event.round} of {event.rounds}")
                self._rounds = event.rounds
            case SiteReplied(accepted=True):
                self._up, self._down = self._up + event.bytes_up, self._down + event.bytes_down
                if event.privacy is not None and event.privacy.delta is not None:
                    spent, budget = event.privacy.epsilon_total, event.privacy.epsilon_budget
                    self._epsilon[event.site] = f"{event.site} {epsilon_text(spent)} of {epsilon_text(budget)}"
            case SiteReplied():
                self._print(f"round {event.round}: {event.site} not used: {event.code}, {event.reason}")
            case Evaluated():
                value = quality_text(event.metric, event.value)
                self._print(f"round {event.round}: held-out {event.metric} {value}, loss {event.loss:.3f}")
            case RoundFinished():
                epsilon = f"; ε {', '.join(self._epsilon.values())}" if self._epsilon else ""
                if event.privacy is not None:
                    spent, budget = event.privacy.epsilon_total, event.privacy.epsilon_budget
                    epsilon += f"; ε of a whole site {epsilon_text(spent)} of {epsilon_text(budget)}"
                replies = "replies withheld" if event.accepted is None else f"{event.accepted} replies"
                secret = event.accepted is None
                up, down = (byte_text(None if secret else count) for count in (self._up, self._down))
                training = "" if event.train_s is None else f", {event.train_s:.1f} s training"
                self._print(
                    f"round {event.round} of {self._rounds}: {replies}{training}; sent {up}, received {down}{epsilon}"
                )
            case RunFinished():
                self._print("finished" if event.seconds is None else f"finished in {event.seconds:.1f} s")
            case PersonalEvaluated():
                value = quality_text(event.metric, event.value)
                self._print(f"each site's own model: held-out {event.metric} {value}")
            case BestKept():
                self._print(f"kept     round {event.round}, the best by public held-out records")
            case StoppedEarly():
                self._print(f"stopped  after round {event.round} of {self._rounds}: {event.reason}")
            case RoundStarted():
                pass
