"""Whether a site is ready: each thing it needs, tried, with what to do where it fails. Spends nothing."""

from __future__ import annotations

import fcntl
import secrets
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from client.bundles import BUNDLES_FILE, allowed_bundles
from client.door import CARD
from client.health import check_books, check_space
from client.listening import check_folder
from client.relay import relay
from client.site import Site, tokenize_site
from client.site_file import account_of, socket_path
from conf.schema.model import LoRA, Model
from conf.schema.site import SiteBudget, SiteFile, SiteNode
from finetuning.adapters import attach
from finetuning.models import load_base
from finetuning.people import people_of
from privacy.ledger.keys import SECRET_FILE, SIGNING_KEY_FILE, load_or_create_keys
from protocol.cards import CHALLENGE_BYTES
from protocol.errors import CloisterError, ConfigError
from protocol.records import challenge_to_record, record_to_card

__all__ = ["Outcome", "check_site"]

_REACH_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """What became of one check. None: it does not apply."""

    name: str
    passed: bool | None
    detail: str
    fix: str


def check_site(file: SiteFile, now: datetime) -> Iterator[Outcome]:
    """Yield the outcome of each check, in an order in which the first failure is the one to mend first.

    Args:
        file: the site's own file.
        now: aware of its time zone.
    """
    checks: tuple[tuple[str, Callable[[], str | None], str], ...] = (
        ("policy", lambda: _policy(file), "write the policy section; cloister site init shows every line"),
        ("budget", lambda: _budget(file, now), "set epsilon, delta and expires of budget, and of site_budget"),
        ("disk", lambda: f"{check_space(_with_folder(file))} MiB free", "free the disk, or lower serve.min_free_mib"),
        ("keys", lambda: _keys(file), "restore the keys from a backup; mode 0600, the state directory 0700"),
        (
            "ledger and clock",
            lambda: f"{check_books(file, now)} entries, each hash and signature verified",
            "cloister ledger verify --site site.yaml, then --ledger STATE/site_ledger.db; restore the newest copy; set "
            "the clock by NTP",
        ),
        ("model", lambda: _model(file), "install the model's files at model_path; compare digests with the server"),
        ("data", lambda: _data(file), "mend data.source, data.columns, published_records or the records"),
        ("socket", lambda: _socket(file), "end a process that hangs; give the socket a folder of its own"),
        ("node", lambda: _node(file), "mend node.user, node.private_key (mode 0600), node.root_certificates"),
        ("server", lambda: _server(file), "check address, firewall and certificate with the server's operator"),
        ("bundles", lambda: _bundles(file), "cloister site allow-bundle"),
    )
    for name, check, fix in checks:
        try:
            detail = check()
        except (CloisterError, OSError) as error:
            yield Outcome(name, False, str(error), fix)
        else:
            yield Outcome(name, None if detail is None else True, detail or "not configured", fix)


def _policy(file: SiteFile) -> str:
    if file.policy is None:
        raise ConfigError("the site file has no policy section, so every instruction is refused")
    approval = "each experiment needs approval" if file.policy.require_approval else "no approval is needed"
    return f"{', '.join(file.policy.privacy_modes) or 'no local privacy mode'}; {approval}"


def _budget(file: SiteFile, now: datetime) -> str | None:
    found: list[str] = []
    for name, budget in (("budget", file.budget), ("site_budget", file.site_budget)):
        if budget is None:
            continue
        if budget.expired(now):
            raise ConfigError(f"{name} expired on {budget.expires}")
        unit = budget.unit if isinstance(budget, SiteBudget) else "site"
        until = budget.expires or "further notice"
        found.append(f"ε={budget.epsilon:g} at δ={budget.delta:.3g} per {unit}, until {until}")
    return "; ".join(found) or None


def _with_folder(file: SiteFile) -> SiteFile:
    Path(file.state_directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    return file


def _keys(file: SiteFile) -> str:
    folder = Path(file.state_directory)
    mode = folder.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{folder} has mode {mode:04o}, others can look into it; run: chmod 700 {folder}")
    if not (folder / SIGNING_KEY_FILE).exists() and not (folder / SECRET_FILE).exists():
        return "none yet; `cloister site serve` makes them"
    key = load_or_create_keys(folder).signing
    return f"ledger key {key.key_id}; as federation.site_keys has it: {key.verifying.to_hex()}"


def _model(file: SiteFile) -> str:
    digest = load_base(Model(path=file.model_path), file.task, file.runtime.device).digest
    if file.policy is not None and file.policy.bases is not None and digest not in file.policy.bases:
        raise ConfigError(f"the base has digest {digest}, which is not among policy.bases")
    return f"digest {digest}"


def _data(file: SiteFile) -> str:
    base = load_base(Model(path=file.model_path), file.task, file.runtime.device)
    rows = Site(file).read_records()
    tokenized = tokenize_site(file, rows, attach(base, LoRA(), file.task))
    count = len(tokenized.examples)
    if count > file.published_records:
        raise ConfigError(f"{count} records are more than published_records={file.published_records}; publish more")
    told = "".join(f"; {sentence}" for sentence in tokenized.report.sentences()[1:])
    if file.published_users is None:
        return f"{count} records fit the schema (a figure for you alone){told}"
    if file.data.user_column is None:
        raise ConfigError("published_users is set, and data.user_column, which names the person of a record, is null")
    people = people_of(rows, file.data.user_column)
    if len(people) > file.published_users:
        raise ConfigError(f"{len(people)} users are more than published_users={file.published_users}; publish more")
    joined = f"; {people.sentence(file.data.user_column)}" if people.joined else ""
    return f"{count} records of {len(people)} users fit the schema (figures for you alone){told}{joined}"


def _socket(file: SiteFile) -> str:
    path, lock = socket_path(file), Path(file.state_directory) / "serve.lock"
    check_folder(file)
    if not lock.exists() or _is_free(lock):
        return f"{path}; no process serves this site now"
    asked = challenge_to_record(secrets.token_bytes(CHALLENGE_BYTES))
    card = record_to_card(relay(path, CARD, asked, silence_s=_REACH_S))
    return f"{path}; {card.site} answers"


def _is_free(lock: Path) -> bool:
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _node(file: SiteFile) -> str | None:
    node = file.node
    if node is None:
        return None
    if node.root_certificates is not None:
        Path(node.root_certificates).read_bytes()
    key = "" if node.private_key is None else _node_key(Path(node.private_key), account_of(node) is not None)
    if node.insecure:
        return "no TLS: for trials on one machine only"
    return f"TLS{key}"


def _node_key(path: Path, read_by_root: bool) -> str:
    """Return how the node key is there. Where root starts the SuperNode, it may be one that only root can read."""
    mode = path.stat().st_mode
    if mode & 0o077:
        raise ConfigError(f"others can read {path}; run: chmod 600 {path}")
    try:
        path.read_bytes()
    except PermissionError:
        if not read_by_root:
            raise
        return " and a node key, which this user cannot read: root reads it at the start"
    return " and node key"


def _server(file: SiteFile) -> str | None:
    node = file.node
    if node is None:
        return None
    host, _, port = node.superlink.rpartition(":")
    if node.insecure:
        return _healthy(HTTPConnection(host, int(port), timeout=_REACH_S), node, "no TLS")
    context = ssl.create_default_context(cafile=node.root_certificates)
    secured = HTTPSConnection(host, int(port), timeout=_REACH_S, context=context)
    return _healthy(secured, node, "a valid certificate")


def _healthy(connection: HTTPConnection, node: SiteNode, shown: str) -> str:
    """Ask what stands behind the address: a proxy answers also while its server is down."""
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except HTTPException as error:
        raise ConfigError(
            f"{node.superlink} accepts connections and speaks no HTTP ({type(error).__name__})"
        ) from error
    finally:
        connection.close()
    if status != 200:
        raise ConfigError(f"{node.superlink} answers, and says {status} to /health: the server behind it is down")
    return f"{node.superlink} is up, with {shown}"


def _bundles(file: SiteFile) -> str | None:
    if file.node is None:
        return None
    path = Path(file.state_directory) / BUNDLES_FILE
    if not path.exists():
        return "no list yet; cloister site start makes it with this release's own bundle"
    if not allowed_bundles(path):
        raise ConfigError(f"{path} lists no digest, so no message from a server is ever answered")
    return f"{len(allowed_bundles(path))} allowed"
