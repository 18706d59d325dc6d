"""A key, data sets, bookings, a ledger in a file, and a real PostgreSQL server."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from glob import glob
from pathlib import Path

import pytest

from privacy.identity import DataIdentity, identify
from privacy.ledger import Booking, Budget, Ledger, SigningKey
from privacy.mechanisms import SubsampledGaussian

STEP = SubsampledGaussian(0.05, 1.0, 10)
DELTA = 1e-5


@pytest.fixture(scope="session")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="session")
def people() -> Callable[..., DataIdentity]:
    """Return `people(first, last)`: the data set of the people with these numbers."""

    def make(first: int = 0, last: int = 50) -> DataIdentity:
        return identify((f"person {number}".encode() for number in range(first, last)), b"k" * 32)

    return make


@pytest.fixture(scope="session")
def booking() -> Callable[..., Booking]:
    """Return `booking(round, ...)`: ten steps of a run of forty, unless said otherwise."""

    def make(
        round_number: int,
        run: str = "run",
        mechanism: SubsampledGaussian = STEP,
        schedule: SubsampledGaussian | None = None,
        inputs: str | None = None,
    ) -> Booking:
        whole = schedule or mechanism.repeated(40)
        return Booking(run, round_number, "plan", whole, mechanism, inputs or f"{run}/{round_number}")

    return make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def open_ledger(path: Path, key: SigningKey, people: Callable[..., DataIdentity]) -> Iterator[Callable[..., Ledger]]:
    """Return `open_ledger(budget, data)`; all that were opened are closed at the end."""
    opened: list[Ledger] = []

    def make(epsilon: float = 10.0, data: DataIdentity | None = None, **options: object) -> Ledger:
        budget = Budget(epsilon, options.get("delta", DELTA), options.get("unit", "record"))  # type: ignore[arg-type]
        clock = lambda: datetime(2030, 1, 2, tzinfo=UTC)  # noqa: E731
        ledger = Ledger(options.get("location", path), key, data or people(), budget, clock)  # type: ignore[arg-type]
        opened.append(ledger)
        return ledger

    yield make
    for ledger in opened:
        ledger.close()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket folder of a real server, run by a user who is not root."""
    found = sorted(glob("/usr/lib/postgresql/*/bin"))
    if not found:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses to run as root, and setpriv is missing")
    binaries = Path(found[-1])
    # Not below pytest's folder: that one is closed to other users, and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="cloister-pg-"))
    other = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    if other:
        shutil.chown(folder, "postgres", "postgres")
    data, log = folder / "data", folder / "log"

    def run(*command: str) -> None:
        subprocess.run([*other, *command], check=True, capture_output=True, cwd=folder, timeout=600)

    try:
        run(str(binaries / "initdb"), "-D", str(data), "-U", "cloister", "-A", "trust", "-E", "UTF8", "--no-locale")
        options = f"-k {folder} -c listen_addresses='' -c synchronous_commit=off"
        start = [str(binaries / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(log), "-w", "start"]
        # Not captured: the server inherits the pipes and would hold them open.
        subprocess.run([*other, *start], check=True, cwd=folder, timeout=600, stdout=subprocess.DEVNULL)
        yield folder
    finally:
        if (data / "postmaster.pid").exists():
            run(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: Path, request: pytest.FixtureRequest) -> str:
    """The URL of a new, empty database."""
    import psycopg

    name = f"ledger_{abs(hash(request.node.nodeid)):x}"
    with psycopg.connect(host=str(postgres_server), user="cloister", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://cloister@/{name}?host={postgres_server}"
