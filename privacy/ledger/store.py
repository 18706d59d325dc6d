"""Where the entries are kept: SQLite in a file, or PostgreSQL; one writer at a time, on disk when a write returns."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
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
    type_coerce,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.types import NullType

from privacy.identity import DataIdentity
from privacy.ledger.chain import Entry
from protocol.errors import LedgerUnusable, PrivacyError

__all__ = ["Snapshot", "Store", "Transaction", "read_snapshot"]

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

_UNITS = type_coerce(_data_sets.c.units, NullType())
"""As they are stored: a number in their place must not be taken for a count of bytes."""

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

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._name = name

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries, by sequence number.

        Raises:
            PrivacyError: a cell holds another type of value than was written.
        """
        rows = self._connection.execute(select(_entries).order_by(_entries.c.sequence))
        return tuple(self._entry(row) for row in rows.mappings())

    def append(self, entry: Entry) -> None:
        """Add an entry."""
        self._connection.execute(_entries.insert().values(**asdict(entry)))

    def fingerprints(self) -> frozenset[str]:
        """Return the fingerprints of the data sets that are stored."""
        return frozenset(self._connection.execute(select(_data_sets.c.fingerprint)).scalars())

    def data_set(self, fingerprint: str) -> DataIdentity:
        """Return a stored data set."""
        query = select(_UNITS).where(_data_sets.c.fingerprint == fingerprint)
        return self._data_set(fingerprint, self._connection.execute(query).scalar_one())

    def data_sets(self) -> dict[str, DataIdentity]:
        """Return all stored data sets."""
        rows = self._connection.execute(select(_data_sets.c.fingerprint, _UNITS)).all()
        return {fingerprint: self._data_set(fingerprint, units) for fingerprint, units in rows}

    def add_data_set(self, data: DataIdentity) -> None:
        """Store a data set."""
        self._connection.execute(_data_sets.insert().values(fingerprint=data.fingerprint, units=data.packed))

    def _entry(self, row: Mapping[Any, Any]) -> Entry:
        for name, value in row.items():
            expected = int if name in ("sequence", "schema_version") else str
            if not isinstance(value, expected):
                raise LedgerUnusable(
                    f"the ledger at {self._name} is not as it was written: entry {row['sequence']} holds "
                    f"{type(value).__name__} where {expected.__name__} belongs, in its column {name}; restore a backup"
                )
        return Entry(**row)

    def _data_set(self, fingerprint: object, units: object) -> DataIdentity:
        if not (isinstance(fingerprint, str) and isinstance(units, bytes)):
            raise LedgerUnusable(
                f"the ledger at {self._name} is not as it was written: the units of data set {str(fingerprint)[:12]} "
                f"are {type(units).__name__}, not bytes; restore a backup"
            )
        return DataIdentity.unpack(units)


class Store:
    """The database of one ledger."""

    def __init__(self, location: str | Path, *, read_only: bool = False) -> None:
        """Open a store.

        Args:
            location: a path (SQLite), or a URL, such as `postgresql+psycopg://user@host/database`.
            read_only: make nothing and change nothing; a copy that cannot be written will do.

        Raises:
            PrivacyError: it cannot be reached, is damaged, or holds something else.
        """
        url = _url(location)
        self.name = url.render_as_string(hide_password=True) if _is_postgres(url) else str(url.database)
        with self._explained("opened"):
            self._engine = _postgres_engine(url) if _is_postgres(url) else _sqlite_engine(Path(self.name), read_only)
        try:
            with self._explained("opened"):
                if not read_only:
                    with self._engine.begin() as connection:
                        _metadata.create_all(connection)
                with self._connected_for_reading() as connection:
                    _check_layout(connection, self.name)
        except PrivacyError:
            self._engine.dispose()
            raise

    @contextmanager
    def writing(self) -> Generator[Transaction, None, None]:
        """Hold the ledger alone: what is read stays true until the end, and then what was added is on disk."""
        with self._explained("written"), self._engine.begin() as connection:
            yield Transaction(connection, self.name)

    @contextmanager
    def reading(self) -> Generator[Transaction, None, None]:
        """See one state of the ledger, without keeping anybody from writing."""
        with self._explained("read"), self._connected_for_reading() as connection:
            yield Transaction(connection, self.name)

    def snapshot(self) -> Snapshot:
        """Return everything.

        Raises:
            PrivacyError: it cannot be read, or SQLite's own check of the file fails.
        """
        with self._explained("read"), self._connected_for_reading() as connection:
            if connection.dialect.name == "sqlite":
                found = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one())
                if found != "ok":
                    raise LedgerUnusable(
                        f"the ledger at {self.name} is damaged: {' '.join(found.split())}; restore a backup"
                    )
            transaction = Transaction(connection, self.name)
            return Snapshot(transaction.entries(), transaction.data_sets())

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def _connected_for_reading(self) -> Connection:
        return self._engine.connect().execution_options(cloister_reading=True)

    @contextmanager
    def _explained(self, done: str) -> Generator[None, None, None]:
        """Turn the database's errors into one sentence."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            damaged = any(word in _reason(error) for word in ("malformed", "corrupt", "not a database"))
            fix = "; it is damaged or no ledger: restore a backup" if damaged else ""
            raise LedgerUnusable(f"the ledger at {self.name} cannot be {done}: {_reason(error)}{fix}") from error


def _url(location: str | Path) -> URL:
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
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


def _postgres_engine(url: URL) -> Engine:
    try:
        engine = create_engine(url, poolclass=NullPool)  # no pool: see `_sqlite_engine`
    except ModuleNotFoundError as error:
        raise PrivacyError("a ledger in PostgreSQL needs its driver; run: pip install 'cloister[postgres]'") from error
    event.listen(engine, "begin", _begin_postgres)
    return engine


def _sqlite_engine(path: Path, read_only: bool) -> Engine:
    """Return the engine of one file. No pool: a simulation opens many ledgers, and an idle connection holds megabytes.

    SQLAlchemy's documented recipe for SQLite: transaction control is taken away from the driver.
    """
    if read_only:
        if not path.is_file():
            raise PrivacyError(f"there is no ledger at {path}; make one with: cloister ledger init")
        connect = _reader(path)
    else:
        _make_private(path)
        connect = _writer(path)
    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(path: Path) -> None:
    """Make an empty file of mode 0600, unless there is one; SQLite gives its journals the mode of the database."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _writer(path: Path) -> Callable[[], sqlite3.Connection]:
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        connection.text_factory = _text
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    return connect


def _reader(path: Path) -> Callable[[], sqlite3.Connection]:
    """Open without changing a byte.

    A database in WAL mode wants a journal and shared memory beside it, which SQLite removes only if it may write. Where
    it may not, a file without a journal is all there is, and is read as it stands (`immutable`).
    """
    journal = path.with_name(path.name + "-wal")

    def connect() -> sqlite3.Connection:
        effective = os.access in os.supports_effective_ids
        if all(os.access(each, os.W_OK, effective_ids=effective) for each in (path, path.parent)):
            mode = "mode=rw"
        else:
            mode = "mode=ro" if journal.exists() and journal.stat().st_size else "mode=ro&immutable=1"
        uri = f"{path.resolve().as_uri()}?{mode}"
        connection = sqlite3.connect(uri, timeout=60, isolation_level=None, uri=True)
        connection.text_factory = _text
        connection.execute("PRAGMA query_only=1")
        return connection

    return connect


def read_snapshot(location: str | Path) -> Snapshot:
    """Return everything in the ledger at a path or URL, which is left as it is.

    Raises:
        PrivacyError: as `Store` and `Store.snapshot` do.
    """
    store = Store(location, read_only=True)
    try:
        return store.snapshot()
    finally:
        store.close()


def _text(stored: bytes) -> str:
    """Read text that may be damaged; what is no UTF-8 becomes an escape that no entry holds."""
    return stored.decode("utf-8", "backslashreplace")


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
    return (str(getattr(error, "orig", None) or error).strip() or type(error).__name__).splitlines()[0]
