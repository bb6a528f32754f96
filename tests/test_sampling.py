"""Frame sampling: one frame a segment, for every length and count."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bt_adapter.data import sample_indices

LONGER = st.integers(1, 40).flatmap(lambda t: st.tuples(st.integers(t, 3000), st.just(t)))  # (total, frames)
ANY = st.tuples(st.integers(1, 3000), st.integers(1, 40))


def segment(index: int, total: int, frames: int) -> int:
    """Segment that holds the centre of a frame: floor((index + 1/2) · frames / total)."""
    return (2 * index + 1) * frames // (2 * total)


@given(LONGER, st.sampled_from(["middle", "random"]), st.integers(0, 10**6))
def test_one_frame_of_each_segment(case, sampling, seed):
    total, frames = case
    indices = sample_indices(total, frames, sampling, torch.Generator().manual_seed(seed))
    assert indices.dtype == torch.int64 and indices.shape == (frames,)
    assert [segment(i, total, frames) for i in indices.tolist()] == list(range(frames))
    assert 0 <= indices.min() and indices.max() < total


@given(ANY, st.sampled_from(["middle", "random", "reference"]), st.integers(0, 10**6))
def test_ascending_and_in_range(case, sampling, seed):
    indices = sample_indices(*case, sampling, torch.Generator().manual_seed(seed)).tolist()
    assert indices == sorted(indices)
    assert 0 <= indices[0] and indices[-1] < case[0]


@given(LONGER)
def test_middle_is_the_middle(case):
    total, frames = case
    for i, index in enumerate(sample_indices(total, frames).tolist()):
        assert index <= (i + 0.5) * total / frames + 1e-9 and (i + 0.5) * total / frames < index + 1 + 1e-9


@given(st.integers(1, 200), st.sampled_from(["middle", "random"]))
def test_as_many_frames_as_there_are(total, sampling):
    assert sample_indices(total, total, sampling).tolist() == list(range(total))


@given(st.integers(1, 30), st.integers(1, 5))
def test_fewer_frames_than_asked_repeat_evenly(total, times):
    for sampling in ("middle", "random"):
        repeated = sample_indices(total, total * times, sampling).tolist()
        assert repeated == [f for f in range(total) for _ in range(times)]


@given(st.integers(1, 30), st.integers(1, 60))
def test_too_few_frames_each_is_used_about_as_often(total, extra):
    counts = torch.bincount(sample_indices(total, total + extra), minlength=total)
    assert counts.max() - counts.min() <= 1


def test_known_values():
    assert sample_indices(120, 8).tolist() == [7, 22, 37, 52, 67, 82, 97, 112]
    assert sample_indices(13, 10).tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 11, 12]
    assert sample_indices(1, 8).tolist() == [0] * 8
    assert sample_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_reference_rule():
    # y = 119/8 = 14.875: starts 0 15 30 45 60 74 89 104 (59.5 is a tie, to even), plus floor(7.4375)
    assert sample_indices(120, 8, "reference").tolist() == [7, 22, 37, 52, 67, 81, 96, 111]
    assert sample_indices(8, 8, "reference").tolist() == [0, 1, 2, 3, 4, 4, 5, 6]


@given(LONGER)
def test_reference_rule_stays_within_two_frames_of_the_middle(case):
    assert (sample_indices(*case, "reference") - sample_indices(*case, "middle")).abs().max() <= 2


def test_random_draws_repeat_with_the_generator_and_reach_every_frame():
    def draw(seed):
        return sample_indices(20, 6, "random", torch.Generator().manual_seed(seed)).tolist()

    assert draw(1) == draw(1)
    seen = set(itertools.chain.from_iterable(draw(seed) for seed in range(200)))
    assert seen == set(range(20))  # a frame of a 4-frame segment is missed in 200 draws with p < 1e-24


@pytest.mark.parametrize("arguments", [(0, 8), (-1, 8), (8, 0), (8, -3)])
def test_counts_below_one(arguments):
    with pytest.raises(ValueError, match=r"(total|frames) must be at least 1, got"):
        sample_indices(*arguments)


@pytest.mark.parametrize("arguments", [(8.0, 2), (8, "2"), (True, 1), (8, None)])
def test_counts_of_wrong_type(arguments):
    with pytest.raises(TypeError, match=r"(total|frames) must be an int, got"):
        sample_indices(*arguments)


def test_unknown_rule():
    with pytest.raises(ValueError, match="sampling must be one of 'middle', 'random', 'reference', got 'first'"):
        sample_indices(8, 2, "first")
