"""A site's record of what it has spent: durable, append-only, asked before every round.

An entry is written *before* its steps are executed (`reserve`) and marked when they were (`commit`); a crash in between
counts as spent. The table lives in SQLite through SQLAlchemy, so an entry is on disk when `reserve` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Column, Connection, Engine, Float, Integer, MetaData, String, Table, create_engine, event, select
from sqlalchemy.pool import NullPool

from privacy.accounting import epsilon_of
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded

__all__ = ["Budget", "Ledger", "Reservation"]

_TOLERANCE = 1e-9
"""Relative; a noise multiplier calibrated to the budget must not fail by the last bit of a float."""

_metadata = MetaData()
_entries = Table(
    "entries",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("at", String, nullable=False),
    Column("run", String, nullable=False),
    Column("round", Integer, nullable=False),
    Column("sampling_rate", Float, nullable=False),
    Column("noise_multiplier", Float, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("state", String, nullable=False),
)


@dataclass(frozen=True)
class Budget:
    """The most a site's records may ever cost, over all runs."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Reservation:
    """Steps that are booked and may now be executed; `epsilon_after` counts them."""

    entry: int
    epsilon_after: float


class Ledger:
    """The entries of one site's data set, in one SQLite file."""

    def __init__(self, path: Path, budget: Budget, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = _durable_engine(path)
        self._budget = budget
        self._clock = clock
        _metadata.create_all(self._engine)

    def reserve(self, run: str, round_number: int, mechanism: SubsampledGaussian) -> Reservation:
        """Book `mechanism` and return the reservation; when this returns, the entry is on disk.

        Raises:
            BudgetExceeded: with what is spent, what it would become, and the budget. Nothing is booked then.
        """
        with self._engine.begin() as connection:  # an immediate transaction: two processes cannot both see room
            spent = _mechanisms(connection)
            after = epsilon_of([*spent, mechanism], self._budget.delta)
            if not after <= self._budget.epsilon * (1 + _TOLERANCE):  # unknown (NaN) means refused
                raise BudgetExceeded(
                    f"round {round_number} would raise this site's ε from {self._epsilon(spent):.3f} to {after:.3f}, "
                    f"above its budget of {self._budget.epsilon:g} at δ={self._budget.delta:.3g}; nothing was trained"
                )
            values = {
                "at": self._clock().isoformat(),
                "run": run,
                "round": round_number,
                "sampling_rate": mechanism.sampling_rate,
                "noise_multiplier": mechanism.noise_multiplier,
                "steps": mechanism.steps,
                "state": "reserved",
            }
            inserted = connection.execute(_entries.insert().values(**values).returning(_entries.c.id))
            return Reservation(int(inserted.scalar_one()), after)

    def commit(self, reservation: Reservation) -> None:
        """Mark that the reserved steps were executed; called before anything leaves the site."""
        with self._engine.begin() as connection:
            connection.execute(_entries.update().where(_entries.c.id == reservation.entry).values(state="committed"))

    def spent(self, run: str | None = None) -> float:
        """Return the ε of all entries (of one run), reserved ones included, at the budget's δ."""
        return self._epsilon(self.mechanisms(run))

    def mechanisms(self, run: str | None = None) -> list[SubsampledGaussian]:
        """Return what all entries (of one run) booked, in order."""
        with self._engine.connect() as connection:
            return _mechanisms(connection, run)

    @property
    def budget(self) -> Budget:
        """The budget this ledger keeps."""
        return self._budget

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def _epsilon(self, mechanisms: list[SubsampledGaussian]) -> float:
        return epsilon_of(mechanisms, self._budget.delta)


def _mechanisms(connection: Connection, run: str | None = None) -> list[SubsampledGaussian]:
    query = select(_entries.c.sampling_rate, _entries.c.noise_multiplier, _entries.c.steps).order_by(_entries.c.id)
    rows = connection.execute(query if run is None else query.where(_entries.c.run == run))
    return [SubsampledGaussian(rate, noise, steps) for rate, noise, steps in rows]


def _durable_engine(path: Path) -> Engine:
    """Return an engine whose transactions are immediate (one writer at a time) and on disk when they end."""
    # No pool: a simulation opens many ledgers, and an idle connection holds megabytes.
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 60}, poolclass=NullPool)

    # SQLAlchemy's documented recipe for SQLite: take transaction control away from the driver.
    @event.listens_for(engine, "connect")
    def _configure(connection: object, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # type: ignore[attr-defined]
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
