"""What one unit of a site is: a record, or a person with all of theirs."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client.marks import marks_of
from conf.schema.data import DataConfig
from conf.schema.privacy import LocalPrivacy, UserLevel
from finetuning.people import people_of
from finetuning.rows import Row
from protocol.errors import DataError

__all__ = ["Units", "units_of"]


@dataclass(frozen=True)
class Units:
    """The protected units of a site, all of it secret.

    `members[u]` are the positions of unit u's records among the site's examples, `names[u]` the bytes that identify the
    unit: the record's own content, or the name of the person. `marks` are what records are known by in another shape; a
    person needs none. `spellings` are the values that stood for the people, by which earlier ledgers knew them.
    """

    members: tuple[tuple[int, ...], ...]
    names: tuple[bytes, ...]
    marks: frozenset[bytes] = frozenset()
    spellings: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self.members)


def units_of(rows: Sequence[Row], privacy: LocalPrivacy, data: DataConfig, key: bytes) -> Units:
    """Return the units of records, one row per example.

    A record is identified by what is read of it (`data.columns`): another column, another
    name of a column, or another order makes no new record. What it is known by in another shape: `client.marks`.

    Under user-level privacy all records with one name are one person's, however the name is spelled
    (`finetuning.people`). A person keeps at most `max_records_per_user` records, those with the smallest keyed hash: a
    choice that neither the server nor the order of the file makes.

    Raises:
        DataError: user-level privacy, and no user column or a row in which it names nobody.
    """
    if not isinstance(privacy, UserLevel):
        read = [_read(row, data) for row in rows]
        return Units(tuple((position,) for position in range(len(rows))), tuple(map(_content, read)), marks_of(read))
    user_column = data.user_column
    if user_column is None:
        raise DataError("user-level privacy needs data.user_column, the column that names the person; it is null")
    people = people_of(rows, user_column)
    owned: dict[bytes, list[int]] = {}
    for position, name in enumerate(people.names):
        owned.setdefault(_encoded(name), []).append(position)

    def chosen(positions: list[int]) -> tuple[int, ...]:
        by_hash = sorted(positions, key=lambda position: _hash(key, _content(_read(rows[position], data))))
        return tuple(sorted(by_hash[: privacy.max_records_per_user]))

    kept = {user: chosen(positions) for user, positions in owned.items()}
    names = sorted(kept, key=lambda user: _hash(key, user))
    spellings = frozenset(_encoded(text) for spelled in people.spellings.values() for text in spelled)
    return Units(tuple(kept[name] for name in names), tuple(names), spellings=spellings)


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _read(row: Row, data: DataConfig) -> dict[str, object]:
    return {field: row.get(name) for field, name in data.columns if field != "kind" and name is not None}


def _content(read: Mapping[str, object]) -> bytes:
    texts = {field: value if isinstance(value, list) else str(value) for field, value in read.items()}
    return json.dumps(texts, sort_keys=True, default=str, ensure_ascii=False).encode(errors="surrogatepass")


def _hash(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")
