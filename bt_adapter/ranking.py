"""Ranks and retrieval metrics from a matrix of similarities."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where the right answers stand, summed up over all queries.

    Attributes:
        r1, r5, r10: share of queries whose right answer is among the first 1, 5, 10, in [0, 1].
        median_rank, mean_rank: of the right answers, 1 is best.
    """

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class Retrieval(Places):
    """One direction of retrieval; a rank is 1 + the number of wrong answers of a strictly greater score.

    Attributes:
        queries: how many.
        tied: queries whose right answer has the very score of a wrong one.
        tie_corrected: the same figures of ranks to which each wrong answer of the very same score adds one half. Where
            they are much worse, the scores hardly tell the answers apart.
    """

    queries: int
    tied: int
    tie_corrected: Places | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict for JSON."""
        return asdict(self)


def ranks(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rank the best right answer of each row: 1 + the number of wrong answers of a strictly greater score.

    Args:
        scores: ``[n, m]``, larger is better.
        right: bool ``[n, m]``, at least one in each row.

    Returns:
        Ranks, float64 ``[n]``, and how many wrong answers have the right one's very score, int64 ``[n]``: what
        :func:`tie_corrected` takes.

    Raises:
        ValueError: the shapes differ, a score is NaN, or a row has no right answer.
    """
    if scores.ndim != 2 or scores.shape != right.shape:
        raise ValueError(f"scores and right must both be [n, m], but are {list(scores.shape)} and {list(right.shape)}")
    if right.dtype != torch.bool:
        raise ValueError(f"right must be bool, but is {right.dtype}")
    if scores.isnan().any():
        raise ValueError(f"scores must be numbers, but {int(scores.isnan().any(1).sum())} rows hold NaN")
    if not right.any(1).all():
        raise ValueError(f"right must mark an answer in every row, but {int((~right.any(1)).sum())} rows have none")
    own = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    equal = ((scores == own) & ~right).sum(1)
    return 1 + ((scores > own) & ~right).sum(1).double(), equal


def tie_corrected(place: Tensor, equal: Tensor) -> Tensor:
    """Ranks that are a right answer's mean place among its equals, float64 ``[n]``, from what :func:`ranks` gives."""
    return place + equal / 2


def retrieval(scores: Tensor, right: Tensor) -> Retrieval:
    """Metrics of the queries in the rows; arguments as for :func:`ranks`."""
    place, equal = ranks(scores, right)
    corrected = _places(tie_corrected(place, equal))
    return Retrieval(**vars(_places(place)), queries=len(place), tied=int((equal > 0).sum()), tie_corrected=corrected)


def _places(place: Tensor) -> Places:
    """Sum up ranks ``[n]``."""
    first, fifth, tenth = ((place <= k).double().mean().item() for k in (1, 5, 10))
    return Places(first, fifth, tenth, place.quantile(0.5).item(), place.mean().item())


def dual_softmax(scores: Tensor, temperature: float = 0.01) -> Tensor:
    """``scores`` times their softmax over the queries (rows), ``[n, m]``.

    It lets the queries of a test set compete for an answer, which a system that sees one query at a time cannot do:
    such figures stand apart. Source: arXiv 2109.04290.
    """
    return scores * (scores / temperature).softmax(0)
