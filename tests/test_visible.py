"""VisibleTokens: which (patch, frame) each branch row is, in every form; building one never waits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import HostSyncs

from bt_kernels import VisibleTokens

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6))  # batch, patches, frames
RATIOS = st.floats(0, 1, exclude_max=True)
SEEDS = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(SIZES)
def test_all_holds_every_token_patch_major(sizes):
    batch, patches, frames = sizes
    visible = VisibleTokens.all(batch, patches, frames)
    expected = [p * frames + t for p in range(patches) for t in range(frames)]
    assert visible.index.dtype == torch.int64
    assert visible.index.tolist() == [expected] * batch
    assert (visible.batch, visible.patches, visible.frames, visible.tokens) == (
        batch,
        patches,
        frames,
        len(expected),
    )
    assert (visible.slots, visible.groups, visible.frame_counts) == (frames, patches, None)
    assert torch.equal(visible.target_index, visible.index)


def test_all_with_windows_is_a_grid_of_the_given_width():
    visible = VisibleTokens.all(2, 6, 4, slots=2)
    assert (visible.slots, visible.groups, visible.tokens) == (2, 12, 24)
    assert torch.equal(visible.index, VisibleTokens.all(2, 6, 4).index)
    # Even T, S = T/2: group n // S is one patch in one window of T/2 frames; slot n mod S pairs t, t + T/2.
    for n, place in enumerate(visible.index[0].tolist()):
        patch, frame = divmod(place, 4)
        assert n // 2 == patch * 2 + frame // 2
        assert n % 2 == frame % 2


@pytest.mark.parametrize("patches, frames, slots", [(3, 5, 2), (4, 1, 0), (4, 2, -1), (4, 2, 2.0)])
def test_windows_that_do_not_divide_the_tokens_are_refused(patches, frames, slots):
    with pytest.raises((ValueError, TypeError), match="slots"):
        VisibleTokens.all(1, patches, frames, slots=slots)


@given(SIZES, RATIOS, SEEDS)
def test_tube_groups_are_one_patch_at_all_frames(sizes, ratio, seed):
    batch, patches, frames = sizes
    visible = VisibleTokens.tube(batch, patches, frames, ratio, generator=generator(seed))
    kept = patches - int(ratio * patches)
    assert visible.index.dtype == torch.int64
    assert visible.index.shape == (batch, kept * frames)
    assert (visible.slots, visible.groups) == (frames, kept)
    for row in visible.index.tolist():
        assert row == sorted(set(row))
        tubes = [row[k * frames : (k + 1) * frames] for k in range(kept)]
        for tube in tubes:
            assert {place // frames for place in tube} == {tube[0] // frames}
            assert [place % frames for place in tube] == list(range(frames))
        assert all(0 <= tube[0] // frames < patches for tube in tubes)
    assert torch.equal(visible.target_index, visible.index)  # alignment compares the same (patch, frame)


def test_tube_at_the_published_ratio():
    visible = VisibleTokens.tube(2, 256, 8, 0.7)
    assert visible.groups == 77 and visible.tokens == 77 * 8


def test_tube_draws_each_video_and_each_patch():
    index = VisibleTokens.tube(64, 8, 2, 0.5, generator=generator(0)).index
    assert index.unique(dim=0).shape[0] > 32  # 70 patterns exist, 64 draws give about 42 of them
    assert index.unique().numel() == 16


def reference_mask(batch: int, patches: int, frames: int, masked: int, seed: int) -> torch.Tensor:
    """One pattern of patches a video, tiled frame-major: flat position t·P + p. True = masked."""
    pattern = torch.rand(batch, patches, generator=generator(seed)).argsort(1) < masked
    return pattern.repeat(1, frames)


@given(SIZES, SEEDS)
def test_reference_mask_is_read_patch_major_and_compared_frame_major(sizes, seed):
    batch, patches, frames = sizes
    mask = reference_mask(batch, patches, frames, seed % patches, seed)
    visible = VisibleTokens.from_reference_mask(mask, frames)
    kept = patches - seed % patches
    assert (visible.slots, visible.groups, visible.tokens) == (frames, kept, kept * frames)
    assert (visible.patches, visible.frames, visible.frame_counts) == (patches, frames, None)
    for b in range(batch):
        flat = [f for f in range(patches * frames) if not mask[b, f]]
        # The same flat position means (f // T, f mod T) to the branch and (f mod P, f // P) to the tower.
        assert visible.index[b].tolist() == flat
        assert visible.target_index[b].tolist() == [(f % patches) * frames + f // patches for f in flat]


def test_reference_mask_by_hand():
    # P = 3, T = 2; patch 1 masked: frame-major positions 1 and 4. Patch-major those are (patch 0, frame 1)
    # and (patch 2, frame 0), so the branch sees (0,0) (1,0) (1,1) (2,1); the tower selects patches 0 and 2.
    mask = torch.tensor([[False, True, False, False, True, False]])
    visible = VisibleTokens.from_reference_mask(mask, 2)
    assert visible.index.tolist() == [[0, 2, 3, 5]]
    assert visible.target_index.tolist() == [[0, 4, 1, 5]]


def test_reference_mask_without_masking_is_all_but_for_alignment():
    visible = VisibleTokens.from_reference_mask(torch.zeros(2, 12, dtype=torch.bool), 3)
    assert torch.equal(visible.index, VisibleTokens.all(2, 4, 3).index)
    assert visible.target_index[0].tolist() == [p * 3 + t for t in range(3) for p in range(4)]


@given(SIZES, RATIOS, SEEDS, st.data())
def test_random_counts_padding_and_order(sizes, ratio, seed, data):
    batch, patches, frames = sizes
    counts = data.draw(st.none() | st.lists(st.integers(0, frames), min_size=batch, max_size=batch))
    frame_counts = None if counts is None else torch.tensor(counts)
    visible = VisibleTokens.random(batch, patches, frames, ratio, generator=generator(seed), frame_counts=frame_counts)
    total = patches * frames
    assert visible.index.dtype == torch.int64
    assert visible.index.shape == (batch, total - int(ratio * total))
    assert visible.slots is None and visible.groups is None
    for b, row in enumerate(visible.index.tolist()):
        count = frames if counts is None else counts[b]
        real = [place for place in row if place >= 0]
        assert len(real) == min(len(row), patches * count)
        assert row == real + [-1] * (len(row) - len(real))
        assert real == sorted(set(real)) and all(place < total for place in real)
        assert all(place % frames < count for place in real)
    if counts is None:
        assert visible.frame_counts is None or visible.frame_counts.tolist() == [frames] * batch
    else:
        assert visible.frame_counts.dtype == torch.int64
        assert visible.frame_counts.tolist() == counts


def test_random_draws_every_token():
    index = VisibleTokens.random(64, 4, 3, 0.5, generator=generator(0)).index
    share = torch.bincount(index.flatten(), minlength=12) / 64
    # 6 of 12 tokens are drawn: each has probability ½, and 64 draws have a standard deviation of 0.06.
    assert (share - 0.5).abs().max() < 0.3


@pytest.mark.parametrize("name", ["tube", "random"])
def test_generator_decides_the_draw(name):
    build = getattr(VisibleTokens, name)
    first = build(4, 16, 4, 0.5, generator=generator(7)).index
    assert torch.equal(first, build(4, 16, 4, 0.5, generator=generator(7)).index)
    assert not torch.equal(first, build(4, 16, 4, 0.5, generator=generator(8)).index)
    state = torch.random.get_rng_state()
    build(4, 16, 4, 0.5, generator=generator(7))
    assert torch.equal(state, torch.random.get_rng_state())  # a given generator leaves the global one alone


@pytest.mark.parametrize(
    "build",
    [
        lambda: VisibleTokens.all(2, 6, 4),
        lambda: VisibleTokens.all(2, 6, 4, slots=2),
        lambda: VisibleTokens.tube(2, 6, 4, 0.5),
        lambda: VisibleTokens.random(2, 6, 4, 0.5),
        lambda: VisibleTokens.random(2, 6, 4, 0.5, frame_counts=torch.tensor([1, 4])),
    ],
    ids=["all", "windows", "tube", "random", "padded"],
)
def test_building_does_not_wait_for_the_device(build):
    with HostSyncs() as syncs:
        build()
    assert syncs.calls > 0
    assert syncs.seen == []


def test_the_sync_detector_detects():
    with HostSyncs() as syncs:
        torch.arange(3).sum().item()
        torch.arange(3)[torch.tensor([True, False, True])]
    assert len(syncs.seen) >= 2


@pytest.mark.parametrize("name", ["tube", "random"])
@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf")])
def test_ratio_outside_zero_one_is_refused(name, ratio):
    with pytest.raises(ValueError, match="ratio") as error:
        getattr(VisibleTokens, name)(2, 4, 2, ratio)
    assert str(ratio) in str(error.value)


@pytest.mark.parametrize("name", ["tube", "random"])
@pytest.mark.parametrize("ratio, masked", [(0, 0), (0.0, 0), (0.7, 7), (0.999, 9)])
def test_masked_number_is_the_floor(name, ratio, masked):
    assert getattr(VisibleTokens, name)(1, 10, 1, ratio).tokens == 10 - masked


@pytest.mark.parametrize("name", ["all", "tube", "random"])
def test_empty_batch(name):
    ratio = () if name == "all" else (0.5,)
    visible = getattr(VisibleTokens, name)(0, 4, 2, *ratio)
    assert visible.batch == 0 and visible.index.shape == (0, 8 if name == "all" else 4)


def test_to_moves_every_tensor():
    visible = VisibleTokens.random(2, 4, 3, 0.5, frame_counts=torch.tensor([1, 3]))
    moved = visible.to("meta")
    assert {moved.index.device.type, moved.frame_counts.device.type, moved.target_index.device.type} == {"meta"}
    assert (moved.patches, moved.frames, moved.slots) == (4, 3, None)
    mask = VisibleTokens.from_reference_mask(reference_mask(2, 4, 3, 2, 0), 3)
    assert torch.equal(mask.to("cpu").target_index, mask.target_index)


def test_device_argument():
    for visible in (
        VisibleTokens.all(1, 4, 2, device="meta"),
        VisibleTokens.tube(1, 4, 2, 0.5, device="meta"),
        VisibleTokens.random(1, 4, 2, 0.5, device="meta"),
    ):
        assert visible.index.device.type == "meta"


@pytest.mark.gpu
def test_forms_on_the_gpu_agree_with_the_host():
    counts = torch.tensor([1, 4], device="cuda")
    for visible in (
        VisibleTokens.tube(2, 6, 4, 0.5, device="cuda"),
        VisibleTokens.random(2, 6, 4, 0.5, device="cuda", frame_counts=counts),
    ):
        assert visible.index.is_cuda
        visible.validate()
        assert torch.equal(visible.to("cpu").index, visible.index.cpu())
