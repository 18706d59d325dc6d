"""Where the entries are kept: SQLite in a file, or PostgreSQL; one writer at a time, on disk when a write returns."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from privacy.identity import DataIdentity
from privacy.ledger.chain import Entry
from protocol.errors import LedgerUnusable, PrivacyError

__all__ = ["Snapshot", "Store", "Transaction"]

_metadata = MetaData()
_entries = Table(
    "entries",
    _metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("previous", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("at", String(40), nullable=False),
    Column("schema_version", Integer, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("payload", Text, nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
)
_data_sets = Table(
    "data_sets",
    _metadata,
    Column("fingerprint", String(64), primary_key=True),
    # One row per data set: 100,000 units are 1.6 MB, read and compared in a fraction of what as many rows take.
    Column("units", LargeBinary, nullable=False),
)

_POSTGRES_LOCK = 0x636C6F6973746572
"""The advisory lock of every writer: the letters "cloister" as a number."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a ledger holds, read at one moment."""

    entries: tuple[Entry, ...]
    data_sets: Mapping[str, DataIdentity]
    """By the fingerprint under which each is stored."""


class Transaction:
    """Reads and additions that take effect together or not at all. Nothing can be changed or removed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries, by sequence number."""
        rows = self._connection.execute(select(_entries).order_by(_entries.c.sequence))
        return tuple(Entry(**row) for row in rows.mappings())

    def append(self, entry: Entry) -> None:
        """Add an entry."""
        self._connection.execute(_entries.insert().values(**asdict(entry)))

    def fingerprints(self) -> frozenset[str]:
        """Return the fingerprints of the data sets that are stored."""
        return frozenset(self._connection.execute(select(_data_sets.c.fingerprint)).scalars())

    def data_set(self, fingerprint: str) -> DataIdentity:
        """Return a stored data set."""
        query = select(_data_sets.c.units).where(_data_sets.c.fingerprint == fingerprint)
        return DataIdentity.unpack(bytes(self._connection.execute(query).scalar_one()))

    def add_data_set(self, data: DataIdentity) -> None:
        """Store a data set."""
        self._connection.execute(_data_sets.insert().values(fingerprint=data.fingerprint, units=data.packed))


class Store:
    """The database of one ledger."""

    def __init__(self, location: str | Path, *, create: bool = True) -> None:
        """Open a store.

        Args:
            location: a path (SQLite), or a URL, such as `postgresql+psycopg://user@host/database`.
            create: make what is missing; otherwise it is an error.

        Raises:
            PrivacyError: it cannot be reached (`LedgerUnusable`), or holds something else.
        """
        url = _url(location)
        self.name = url.render_as_string(hide_password=True) if _is_postgres(url) else str(url.database)
        if not _is_postgres(url):
            _prepare_file(Path(self.name), create)
        self._engine = _engine(url)
        try:
            if create:
                with self._engine.begin() as connection:
                    _metadata.create_all(connection)
            with self._connected_for_reading() as connection:
                _check_layout(connection, self.name)
        except (SQLAlchemyError, sqlite3.Error) as error:
            self._engine.dispose()
            raise LedgerUnusable(f"the ledger at {self.name} cannot be opened: {_reason(error)}") from error

    @contextmanager
    def writing(self) -> Generator[Transaction, None, None]:
        """Hold the ledger alone: what is read stays true until the end, and then what was added is on disk.

        Raises:
            LedgerUnusable: the database failed; nothing was added.
        """
        with self._told(), self._engine.begin() as connection:
            yield Transaction(connection)

    @contextmanager
    def reading(self) -> Generator[Transaction, None, None]:
        """See one state of the ledger, without keeping anybody from writing."""
        with self._told(), self._connected_for_reading() as connection:
            yield Transaction(connection)

    def snapshot(self) -> Snapshot:
        """Return everything."""
        with self.reading() as transaction:
            names = transaction.fingerprints()
            return Snapshot(transaction.entries(), {name: transaction.data_set(name) for name in names})

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    @contextmanager
    def _told(self) -> Generator[None, None, None]:
        """Raise the database's own errors as `LedgerUnusable`: damaged, locked for a minute, or the disk is full."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise LedgerUnusable(f"the ledger at {self.name} cannot be used: {_reason(error)}") from error

    def _connected_for_reading(self) -> Connection:
        return self._engine.connect().execution_options(cloister_reading=True)


def _url(location: str | Path) -> URL:
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise PrivacyError(f"the ledger's URL cannot be read: {error}") from error
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite" and url.database:
        return url
    raise PrivacyError(
        f"a ledger cannot be kept in {url.drivername!r}; use a path, or postgresql+psycopg://user@host/database"
    )


def _is_postgres(url: URL) -> bool:
    return url.drivername.startswith("postgresql")


def _prepare_file(path: Path, create: bool) -> None:
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        raise PrivacyError(f"there is no ledger at {path}; make one with: cloister ledger init")


def _engine(url: URL) -> Engine:
    # No pool: a simulation opens many ledgers, and an idle connection holds megabytes.
    if _is_postgres(url):
        try:
            engine = create_engine(url, poolclass=NullPool)
        except ModuleNotFoundError as error:
            raise PrivacyError(
                "a ledger in PostgreSQL needs its driver; run: pip install 'cloister[postgres]'"
            ) from error
        event.listen(engine, "begin", _begin_postgres)
        return engine
    engine = create_engine(url, connect_args={"timeout": 60}, poolclass=NullPool)
    # SQLAlchemy's documented recipe for SQLite: take transaction control away from the driver.
    event.listen(engine, "connect", _connect_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connect_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("cloister_reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _begin_postgres(connection: Connection) -> None:
    """Take the writers' lock before anything is read; a server set to lazy commits must not be lazy here."""
    if connection.get_execution_options().get("cloister_reading"):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return
    connection.exec_driver_sql("SET LOCAL synchronous_commit TO on")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})")


def _check_layout(connection: Connection, name: str) -> None:
    """Refuse a database with other tables: reading it as an empty ledger would forget what was spent."""
    inspector = inspect(connection)
    for table in _metadata.sorted_tables:
        if not inspector.has_table(table.name):
            raise PrivacyError(f"there is no ledger at {name}; make one with: cloister ledger init")
        found = {column["name"] for column in inspector.get_columns(table.name)}
        if found != set(table.columns.keys()):
            raise LedgerUnusable(
                f"the table {table.name} at {name} has another layout than this release writes; read it with the "
                "release that wrote it, and keep the ledger elsewhere"
            )


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
