"""What a check has found, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        what: that was compared.
        where: "formula", or the backend.
        ratio: the largest error as a fraction of what is allowed; NaN if nothing was compared.
        note: where it is largest, or why nothing was compared.
        ran: False: this backend cannot run here.
    """

    what: str
    where: str
    ratio: float
    note: str = ""
    ran: bool = True

    @property
    def ok(self) -> bool:
        return not self.ran or self.ratio <= 1.0  # NaN is not


@dataclass(frozen=True)
class Report:
    """All findings of a check; as text, a table.

    Attributes:
        policy: its text.
        findings: in the order of the table.
    """

    policy: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True where nothing that ran is wrong."""
        return all(finding.ok for finding in self.findings)

    def __str__(self) -> str:
        rows = [("compared", "where", "error / allowed", "", "")]
        rows += [(f.what, f.where, _number(f), _verdict(f), f.note) for f in self.findings]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        wrong = sum(not f.ok for f in self.findings)
        verdict = "nothing is wrong" if not wrong else f"{wrong} of {len(self.findings)} are wrong"
        return "\n".join([f"{self.policy}: {verdict}", *lines])


def _number(f: Finding) -> str:
    if not f.ran:
        return "-"
    return "not finite" if math.isnan(f.ratio) else f"{f.ratio:.2g}"


def _verdict(f: Finding) -> str:
    return "not run" if not f.ran else "ok" if f.ok else "WRONG"
