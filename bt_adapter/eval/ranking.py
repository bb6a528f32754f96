"""Compute ranks and retrieval metrics from a matrix of similarities."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Summary of the ranks of the right answers over all queries.

    Attributes:
        r1, r5, r10: share of queries with the right answer among the first 1, 5, 10, in [0, 1].
        median_rank, mean_rank: of the right answers; 1 is best.
    """

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class Retrieval(Places):
    """Metrics of one direction of retrieval; a rank is 1 + the number of wrong answers with a strictly greater score.

    Attributes:
        queries: number of queries.
        tied: number of queries whose right answer has the same score as a wrong one.
        tie_corrected: the same metrics of ranks to which each wrong answer of equal score adds one half. If they are
            much worse, the scores hardly distinguish the answers.
    """

    queries: int
    tied: int
    tie_corrected: Places | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict for JSON."""
        return asdict(self)


def ranks(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rank the best right answer of each row: 1 + the number of wrong answers with a strictly greater score.

    Args:
        scores: ``[n, m]``, larger is better.
        right: bool ``[n, m]``, at least one True in each row.

    Returns:
        Ranks, float64 ``[n]``, and the number of wrong answers with a score equal to the right one's, int64 ``[n]``:
        the arguments of :func:`tie_corrected`.

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
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    equal = ((scores == best) & ~right).sum(1)
    return 1 + ((scores > best) & ~right).sum(1).double(), equal


def tie_corrected(place: Tensor, equal: Tensor) -> Tensor:
    """Compute the mean rank of each right answer among answers of equal score, float64 ``[n]``, from :func:`ranks`."""
    return place + equal / 2


def retrieval(scores: Tensor, right: Tensor) -> Retrieval:
    """Compute the metrics with one query per row; arguments as for :func:`ranks`."""
    place, equal = ranks(scores, right)
    corrected = _places(tie_corrected(place, equal))
    return Retrieval(**vars(_places(place)), queries=len(place), tied=int((equal > 0).sum()), tie_corrected=corrected)


def _places(place: Tensor) -> Places:
    """Summarise ranks ``[n]``."""
    first, fifth, tenth = ((place <= k).double().mean().item() for k in (1, 5, 10))
    return Places(first, fifth, tenth, place.quantile(0.5).item(), place.mean().item())


def dual_softmax(scores: Tensor, temperature: float = 0.01) -> Tensor:
    """Multiply ``scores`` by their softmax over the queries (rows), ``[n, m]``.

    This uses all queries of the test set together, which a system that gets one query at a time cannot do, so such
    metrics are reported separately. Source: arXiv 2109.04290.
    """
    return scores * (scores / temperature).softmax(0)
