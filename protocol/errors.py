"""Every error Cloister raises on purpose, sorted by what the reader can do about it.

::

    CloisterError
    ├── ConfigError        change the configuration            (exit code 2)
    ├── DataError          change the data or its description  (exit code 3)
    ├── ModelError         change the model or the adapter     (exit code 4)
    ├── PrivacyError       what was asked cannot be private    (exit code 5)
    │   ├── BudgetExceeded the budget does not cover it        (exit code 6)
    │   ├── LedgerUnusable the books cannot be read or kept    (exit code 5)
    │   └── ReplayDiverged the same inputs gave another output (exit code 5)
    ├── SiteRefusal        a site says no, with a reason code  (exit code 7)
    ├── ReplyRejected      a reply failed verification         (exit code 8)
    └── FederationError    too few valid replies to go on      (exit code 9)

A message names the value, the bound it broke, and the fix.
"""

from typing import ClassVar

from protocol.refusals import REFUSALS

__all__ = [
    "BudgetExceeded",
    "CloisterError",
    "ConfigError",
    "DataError",
    "FederationError",
    "LedgerUnusable",
    "ModelError",
    "PrivacyError",
    "ReplayDiverged",
    "ReplyRejected",
    "SiteRefusal",
]


class CloisterError(Exception):
    """The root: catch it to show a message to a person instead of a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(CloisterError):
    """The configuration is wrong; the message lists every problem found."""

    exit_code = 2


class DataError(CloisterError):
    """The data is missing, malformed, or does not fit its declared schema."""

    exit_code = 3


class ModelError(CloisterError):
    """The model cannot be loaded, or the adapter does not fit it."""

    exit_code = 4


class PrivacyError(CloisterError):
    """The promise asked for cannot be kept by what is configured."""

    exit_code = 5


class BudgetExceeded(PrivacyError):
    """Going on would spend more privacy than the budget holds."""

    exit_code = 6


class LedgerUnusable(PrivacyError):
    """The ledger cannot be opened, read or written, or is not as it was left; nothing may be spent."""


class ReplayDiverged(PrivacyError):
    """A round executed again did not give the same bits; what it gave must not leave."""


class SiteRefusal(CloisterError):
    """A site declines an instruction; `code` is machine readable and reveals nothing about its data.

    Raises:
        ValueError: the code is not registered, so nobody who is told it could look it up.
    """

    exit_code = 7

    def __init__(self, code: str, message: str) -> None:
        if code not in REFUSALS:
            raise ValueError(
                f"{code!r} is no code of protocol/refusals.py; add its sentence there and to docs/errors.md"
            )
        super().__init__(message)
        self.code = code


class ReplyRejected(CloisterError):
    """A reply does not answer the instruction it claims to answer; it is never aggregated."""

    exit_code = 8

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FederationError(CloisterError):
    """The federation cannot continue, for example because too few valid replies arrived."""

    exit_code = 9
