"""What a check found, in a form that a table can show."""

from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """Of one check on one server."""

    PASS = "pass"
    PARTLY = "partly"
    FAIL = "fail"
    NOT_RUN = "not run"
    """The server lacks what the check needs; the finding says what."""


class Finding(msgspec.Struct, frozen=True):
    """One cell of the table."""

    check: str
    verdict: Verdict
    detail: str
    """A few words with the counts."""


def counted(check: str, good: int, total: int, what: str, *, bad: str = "") -> Finding:
    """`good` of `total`: all is a pass, none a failure, the rest partly. `bad` names some that were not good."""
    if total == 0:
        return Finding(check, Verdict.NOT_RUN, f"nothing to count of {what}")
    verdict = Verdict.PASS if good == total else Verdict.FAIL if good == 0 else Verdict.PARTLY
    return Finding(check, verdict, f"{good} of {total} {what}" + (f"; not: {bad}" if bad and good < total else ""))
