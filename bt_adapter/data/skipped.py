"""Records clips that cannot be used, with reasons, and stops a run that skips too many."""

from __future__ import annotations

from typing import Any

from bt_adapter.errors import CommandError

# The share of skipped clips is not checked below these numbers of seen and of unusable clips.
LEAST_SEEN = 20
LEAST_UNUSABLE = 3
SPREAD = 3  # standard deviations by which a count may exceed its expectation by chance
NAMED = 10  # most keys listed for one reason


class TooManySkipped(CommandError):
    """More clips are unusable than allowed."""


class Skipped:
    """Clips (or rows, or shards) that cannot be used, each with the first reason given.

    Attributes:
        reasons: key -> reason, in order of addition.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def add(self, key: str, reason: str) -> None:
        """Record that ``key`` cannot be used; an earlier reason is kept."""
        self.reasons.setdefault(key, reason)

    def merge(self, other: Skipped) -> None:
        """Add all entries of another record."""
        for key, reason in other.reasons.items():
            self.add(key, reason)

    def __len__(self) -> int:
        return len(self.reasons)

    def report(self, named: int | None = None) -> str:
        """Return a text of all keys grouped by reason, with counts; at most ``named`` keys per reason (None: all)."""
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
        """Raise :class:`TooManySkipped` if more than ``share`` of the ``seen`` clips (usable or not) are skipped.

        Fewer than 20 seen or 3 unusable clips never raise, so that one bad clip at the start does not stop a run; with
        ``share`` 0 the first one raises. ``listed``: number of skipped entries that do not count, since they were
        found before any clip was seen. ``total``: number of all clips, if those seen are only a part: then more than
        ``share`` of ``total`` raises, and a smaller count only if chance does not explain it, so that the order of the
        clips does not matter.
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
            f"{unusable} of {seen} clips cannot be used, more than the {100 * share:g} % allowed by "
            f"--max-skipped {share:g}; {self.report(NAMED)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a JSON object, for a checkpoint."""
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the entries of a state that :meth:`state_dict` returned."""
        for key, reason in state["reasons"].items():
            self.add(str(key), str(reason))


def _without(key: str, reason: str) -> str:
    """Return a reason without a leading file name, so that files with the same problem form one group."""
    front, colon, rest = reason.partition(": ")
    return rest if colon and ("/" in front or key in front) else reason
