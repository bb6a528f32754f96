"""What could not be used: kept, counted and named."""

from __future__ import annotations

from typing import Any

from bt_adapter.errors import CommandError

# A share of fewer clips than this says nothing yet, nor do fewer unusable ones than that.
LEAST_SEEN = 20
LEAST_UNUSABLE = 3
SPREAD = 3  # standard deviations of a count that chance explains
NAMED = 10  # of one reason


class TooManySkipped(CommandError):
    """More clips than allowed cannot be used."""


class Skipped:
    """Clips (or rows, or shards) that cannot be used, each with the reason. The first reason given stays.

    Attributes:
        reasons: key -> reason, in the order they came.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def add(self, key: str, reason: str) -> None:
        """Note that ``key`` cannot be used."""
        self.reasons.setdefault(key, reason)

    def merge(self, other: Skipped) -> None:
        """Take over what another one noted."""
        for key, reason in other.reasons.items():
            self.add(key, reason)

    def __len__(self) -> int:
        return len(self.reasons)

    def report(self, named: int | None = None) -> str:
        """All keys, grouped by reason, with their numbers; of each reason at most ``named`` keys (None: all)."""
        if not self.reasons:
            return "nothing was skipped"
        groups: dict[str, list[str]] = {}
        for key, reason in self.reasons.items():
            groups.setdefault(_without(key, reason), []).append(key)
        lines = [f"{len(self)} skipped:"]
        for reason, keys in sorted(groups.items(), key=lambda group: -len(group[1])):
            shown = ", ".join(keys[:named])
            more = f" and {len(keys) - named} more" if named is not None and len(keys) > named else ""
            lines.append(f"  {len(keys)}: {reason}: {shown}{more}")
        return "\n".join(lines)

    def check(self, seen: int, share: float, listed: int = 0, total: int | None = None) -> None:
        """Raise :class:`TooManySkipped` if more than ``share`` of ``seen`` clips (usable or not) are noted here.

        Nothing is raised while fewer than 20 were seen, or fewer than 3 are unusable: one bad clip at the start is no
        reason to stop. With ``share`` 0 the first one is. ``listed``: how many of those noted do not count, because
        they were found unusable before any clip was seen. ``total``: how many there are, where those seen are a part:
        raised is then for more than ``share`` of all, and before that only where chance does not explain it, so that
        the order of the clips does not decide.
        """
        unusable = len(self) - listed
        least = LEAST_UNUSABLE if share > 0 else 1
        if unusable < least:
            return
        chance = 0.0 if total is None or share == 0 else SPREAD * unusable**0.5
        if total is not None and unusable > share * total:
            seen = total
        elif (seen < LEAST_SEEN and share > 0) or unusable - chance <= share * seen:
            return
        raise TooManySkipped(
            f"{unusable} of {seen} clips cannot be used, more than the {100 * share:g} % allowed "
            f"(--max-skipped {share:g}); {self.report(NAMED)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what :meth:`state_dict` gave."""
        for key, reason in state["reasons"].items():
            self.add(str(key), str(reason))


def _without(key: str, reason: str) -> str:
    """A reason without the name of the file in front, so that many files share it."""
    front, colon, rest = reason.partition(": ")
    return rest if colon and ("/" in front or key in front) else reason
