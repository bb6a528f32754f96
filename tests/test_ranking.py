"""Retrieval metrics against loops in NumPy, with ties and with several right answers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bt_adapter.eval.ranking import dual_softmax, ranks, retrieval, tie_corrected


def brute_force(scores: np.ndarray, right: np.ndarray) -> tuple[list[float], list[float]]:
    """Of each row's best right answer: its place before its equals, and its mean place over all orders of equals."""
    strict, mean = [], []
    for row, marked in zip(scores, right, strict=True):
        best = max(row[marked])
        wrong = row[~marked]
        above = sum(1 for value in wrong if value > best)
        equal = sum(1 for value in wrong if value == best)
        strict.append(above + 1.0)
        mean.append(np.mean([above + 1 + k for k in range(equal + 1)]))
    return strict, mean


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
def test_equals_brute_force(seed, queries, answers, levels):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, (queries, answers)).astype(np.float32)
    right = random.random((queries, answers)) < 0.3
    right[np.arange(queries), random.integers(0, answers, queries)] = True
    strict, mean = brute_force(scores, right)
    place, equal = ranks(torch.from_numpy(scores), torch.from_numpy(right))
    assert place.tolist() == strict and tie_corrected(place, equal).tolist() == mean
    found = retrieval(torch.from_numpy(scores), torch.from_numpy(right))
    for expected, one in ((strict, found), (mean, found.tie_corrected)):
        for k, value in ((1, one.r1), (5, one.r5), (10, one.r10)):
            assert value == pytest.approx(np.mean(np.array(expected) <= k))
        assert one.median_rank == pytest.approx(np.median(expected))
        assert one.mean_rank == pytest.approx(np.mean(expected))
    assert found.queries == queries and found.tied == int((equal > 0).sum())


def test_a_constant_score_is_chance_once_ties_are_corrected():
    place, equal = ranks(torch.zeros(9, 9), torch.eye(9, dtype=torch.bool))
    assert place.tolist() == [1.0] * 9 and equal.tolist() == [8] * 9
    assert tie_corrected(place, equal).tolist() == [5.0] * 9


def test_duplicate_captions_tie():
    """Two videos with one caption: no other scores more than the right one, whose mean place is 1.5."""
    texts = torch.eye(3)[[0, 0, 2]]
    found = retrieval(torch.eye(3)[[0, 0, 2]] @ texts.T, torch.eye(3, dtype=torch.bool))
    assert found.tied == 2 and found.mean_rank == found.r1 == 1
    assert found.tie_corrected.mean_rank == pytest.approx((1.5 + 1.5 + 1) / 3)
    assert found.tie_corrected.r1 == pytest.approx(1 / 3)


def test_several_right_answers_do_not_tie_with_one_another():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.9]])
    found = retrieval(scores, torch.tensor([[True, True, False, False]]))
    assert found.mean_rank == 2 and found.tie_corrected.mean_rank == 2.5 and found.tied == 1
    assert set(found.to_dict()) == {"r1", "r5", "r10", "median_rank", "mean_rank", "queries", "tied", "tie_corrected"}


def test_dual_softmax_prefers_the_query_that_wants_it_most():
    scores = torch.tensor([[0.9, 0.8], [0.85, 0.1]])
    right = torch.tensor([[False, True], [True, False]])
    assert retrieval(scores, right).r1 == 0.5
    assert retrieval(dual_softmax(scores, 0.05), right).r1 == 1.0


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool), r"\[2, 3\] and \[2, 2\]"),
        (torch.zeros(2, 3), torch.ones(2, 3), "right must be bool"),
        (torch.full((2, 3), torch.nan), torch.ones(2, 3, dtype=torch.bool), "2 rows hold NaN"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), "2 rows have none"),
    ],
)
def test_bad_input(scores, right, message):
    with pytest.raises(ValueError, match=message):
        ranks(scores, right)
