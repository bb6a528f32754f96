"""Resize, crop and normalise: against Pillow, against float64, and the training crop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_adapter.data import CLIP_MEAN, CLIP_STD, TrainTransform, normalise, preprocess
from bt_adapter.data.transforms import _resize, _resize_float, resize_and_crop


def picture(height: int, width: int, frames: int = 2, seed: int = 0) -> torch.Tensor:
    """Smooth colours with noise and hard edges: bicubic overshoots there, so clamping is exercised."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 5, 7, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    noisy[:, :, : height // 3] = (noisy[:, :, : height // 3] > 0.5).float()
    return noisy.mul(255).round().clamp(0, 255).to(torch.uint8)


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: values 0..255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (pixels * std + mean) * 255


SIZES = [(48, 80), (80, 48), (64, 64), (37, 101), (20, 24), (32, 32), (33, 32)]


@pytest.mark.parametrize("shape", SIZES)
def test_close_to_pillow(shape):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    import numpy as np

    frames, size = picture(*shape), 32
    height, width = (size, int(size * shape[1] / shape[0]))
    if shape[0] > shape[1]:
        height, width = (int(size * shape[0] / shape[1]), size)
    top, left = (height - size) // 2, (width - size) // 2
    expected = torch.stack(
        [
            torch.from_numpy(
                np.array(
                    image.fromarray(frame.permute(1, 2, 0).numpy())
                    .resize((width, height), image.Resampling.BICUBIC)
                    .crop((left, top, left + size, top + size))
                )
            ).permute(2, 0, 1)
            for frame in frames
        ]
    )
    difference = (levels(preprocess(frames, size)) - expected).abs()
    # Both round after each of the two passes, from weights of different fixed-point width: one level.
    assert difference.max() <= 1.01
    assert difference.mean() < 0.05


@pytest.mark.parametrize("shape", SIZES)
def test_close_to_bicubic_in_float32(shape):
    """What runs on a GPU, and needs no Pillow to compare with: torch's float path, pass by pass."""
    frames = picture(*shape)
    for target in ((32, 45), (45, 32), (100, 17)):
        difference = _resize(frames, target).float() - _resize_float(frames, target).float()
        # Fixed-point weights: rounding may fall to the other side in either pass.
        assert difference.abs().max() <= 1 and difference.abs().mean() < 0.02


def test_no_resize_is_exact():
    frames = picture(32, 32)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    expected = (frames.double() / 255 - mean) / std
    torch.testing.assert_close(preprocess(frames, 32).double(), expected, rtol=0, atol=1e-6)  # float32 rounding


def test_centre_is_cropped():
    frames = torch.zeros(1, 3, 16, 48, dtype=torch.uint8)
    frames[..., 16:32] = 255
    assert (levels(preprocess(frames, 16)).round() == 255).all()
    assert (levels(preprocess(frames.transpose(2, 3).contiguous(), 16)).round() == 255).all()


def test_channels_keep_their_place():
    frames = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 20, 30)
    result = levels(preprocess(frames, 8)).round()
    assert (result[:, 0] == 255).all() and (result[:, 1:] == 0).all()


def test_memory_format_and_strides_do_not_matter():
    frames = picture(40, 60, frames=4)
    expected = preprocess(frames, 32)
    assert expected.shape == (4, 3, 32, 32) and expected.is_contiguous()
    assert torch.equal(preprocess(frames.contiguous(memory_format=torch.channels_last), 32), expected)
    assert torch.equal(preprocess(torch.cat([frames, frames], 3)[..., :60], 32), expected)
    assert torch.equal(preprocess(frames[::2], 32), expected[::2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_is_close_to_cpu():
    frames = picture(90, 160, frames=20)
    difference = (levels(preprocess(frames.cuda(), 64).cpu()) - levels(preprocess(frames, 64))).abs()
    assert difference.max() <= 1.01 and difference.mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(dtype):
    frames = picture(20, 20)
    assert torch.equal(preprocess(frames, 16, dtype=dtype), preprocess(frames, 16).to(dtype))


def test_input_is_left_alone():
    frames = picture(16, 16)
    before = frames.clone()
    preprocess(frames, 16)
    TrainTransform(16, flip=1.0)(frames)
    assert torch.equal(frames, before)


@pytest.mark.parametrize("short", [1, 2, 3, 20, 50])
@pytest.mark.parametrize("resize", [None, 40])
def test_the_centre_of_very_long_frames_is_that_of_the_whole(short, resize):
    frames = picture(short, 1500 + short % 2)
    wide = _resize(frames, (resize or 32, int((resize or 32) * frames.shape[3] / short)))
    top, left = (wide.shape[2] - 32) // 2, (wide.shape[3] - 32) // 2
    expected = wide[:, :, top : top + 32, left : left + 32].int()
    found = resize_and_crop(frames, 32, resize).int()
    # whole pixels of the resized frame are rounded differently where the sides do not divide
    assert (found - expected).abs().float().mean() < (3 if short == 3 else 1)
    turned = resize_and_crop(frames.transpose(2, 3), 32, resize).transpose(2, 3).int()
    assert (turned - found).abs().float().mean() < 1  # width is resized first, and rounded


def test_a_very_long_frame_takes_little_memory():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        preprocess(torch.full((1, 3, 1, 65_535), 9, dtype=torch.uint8), 224)
    assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) < 20e6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
def test_any_size(height, width, size):
    result = preprocess(torch.full((1, 3, height, width), 77, dtype=torch.uint8), size)
    assert result.shape == (1, 3, size, size)
    assert (levels(result).round() == 77).all()


@pytest.mark.parametrize("transform", [lambda x: preprocess(x, 8), TrainTransform(8), normalise])
@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"rank 4.*got rank 3"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), ValueError, r"rank 4.*got rank 5"),
        (torch.zeros(2, 3, 8, 8), TypeError, r"must be uint8.*got torch.float32"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), ValueError, r"3 channels.*got \[2, 4, 8, 8\]"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ValueError, r"got \[2, 8, 8, 3\]; permute the channels"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), ValueError, r"must not be empty, got \[0, 3, 8, 8\]"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), ValueError, r"must not be empty"),
        ([[0]], TypeError, r"torch.Tensor, got list"),
    ],
)
def test_wrong_frames(transform, frames, error, message):
    with pytest.raises(error, match=message):
        transform(frames)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 8.0}, TypeError, "size must be an int, got float"),
        ({"size": 8, "dtype": torch.uint8}, TypeError, "floating-point"),
        ({"size": 8, "mean": (0.5,)}, ValueError, "3 values"),
        ({"size": 8, "std": (0.5, 0.0, 0.5)}, ValueError, "above 0"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        preprocess(picture(8, 8), **arguments)


@pytest.mark.parametrize(
    "arguments", [{"scale": (0.0, 1.0)}, {"scale": (0.5, 1.1)}, {"ratio": (2.0, 1.0)}, {"flip": 1.5}]
)
def test_wrong_training_ranges(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        TrainTransform(8, **arguments)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6))
def test_training_box_lies_in_the_frame(height, width, seed):
    top, left, h, w = TrainTransform().box(height, width, torch.Generator().manual_seed(seed))
    assert 0 <= top and 0 <= left and h >= 1 and w >= 1 and top + h <= height and left + w <= width


def test_training_box_statistics():
    generator = torch.Generator().manual_seed(0)
    boxes = [TrainTransform(scale=(0.25, 0.5)).box(400, 400, generator) for _ in range(500)]
    shares = torch.tensor([h * w / 400**2 for _, _, h, w in boxes])
    aspects = torch.tensor([w / h for _, _, h, w in boxes])
    assert 0.248 < shares.min() < 0.26 and 0.49 < shares.max() < 0.503  # sides are whole pixels
    assert 0.74 < aspects.min() < 0.77 and 1.30 < aspects.max() < 1.345
    assert aspects.log().mean().abs() < 0.03  # log-uniform and symmetric: standard error 0.0075
    assert {top > 100 for top, *_ in boxes} == {True, False}


def test_training_crop_is_shared_by_the_frames_and_repeats_with_the_generator():
    frames = picture(60, 90, frames=1).expand(3, 3, 60, 90)
    transform = TrainTransform(24, flip=0.5)
    results = [transform(frames, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert results[0].shape == (3, 3, 24, 24)
    assert torch.equal(results[0][0], results[0][1]) and torch.equal(results[0][0], results[0][2])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_training_flip():
    frames = picture(24, 24)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain = preprocess(frames, 24)
    assert torch.equal(TrainTransform(24, **whole)(frames), plain)
    assert torch.equal(TrainTransform(24, **whole, flip=1.0)(frames), plain.flip(-1))
