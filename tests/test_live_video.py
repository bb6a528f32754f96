"""Live video's tokens equal those of the frames that they stand for, at constant memory and work per frame."""

import math

import pytest
import torch
from small_models import SIZES, make, shake

from bt_adapter import BTAdapterVisionModel, LiveVideo
from bt_adapter.data.image_settings import ImageSettings
from bt_kernels import VisibleTokens

DINO = {**SIZES, "model_type": "dinov2", "num_register_tokens": 4, "hidden_act": "gelu"}
DINO = {name: value for name, value in DINO.items() if name != "projection_dim"}


def model(dtype=torch.float64, config=SIZES, **fields) -> BTAdapterVisionModel:
    return shake(make(config, **{"depth": 3, "trained_steps": 4, **fields})).to(dtype)


def frames(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model: BTAdapterVisionModel, clip: torch.Tensor, **options) -> torch.Tensor:
    """Tokens of a clip uint8 [T, 3, H, W] by the model itself, [P+1, D]."""
    return model.video_tokens(model.images.prepare(clip)[None].to(model.tower.dtype), **options)[0]


def block_edges(count: int, size: int, steps: int) -> list[int]:
    """Where the steps of a whole window begin, by the formula in its docstring."""
    block = 1
    while 2 * size * block < count:
        block *= 2
    steps = min(steps, math.ceil(count / block))
    return [min(count, block * math.ceil(step * count / (steps * block))) for step in range(steps + 1)]


@torch.no_grad()
def by_edges(model: BTAdapterVisionModel, clip: torch.Tensor, edges: list[int]) -> torch.Tensor:
    """Tokens of a clip whose time steps are the means of the frames between these edges, from their definition."""
    x = model.tower.run(model.images.prepare(clip).to(model.tower.dtype), model.first_branch_layer)
    states = []
    for layer in range(model.first_branch_layer, model.vision_config.num_hidden_layers - 1):
        x = model.tower.run_layer(layer, x.clone())
        states.append(x)
    means = [torch.stack([s[a:b].mean(0) for a, b in zip(edges, edges[1:], strict=False)])[None] for s in states]
    steps, patches = len(edges) - 1, model.vision_config.patches
    z = model.branch(means, model.tower.position, VisibleTokens.all(1, patches, steps))[0]
    z_mean = z[1:].unflatten(0, (patches, steps)).mean(1)
    x_mean = x.mean(0)
    return torch.cat([x_mean[1:] + z_mean, (x_mean[0] + z[0])[None]]) / 2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("length", [1, 3, 4, 6, 8])
def test_sliding_window_equals_the_last_frames(dtype, limit, length):
    net, clip = model(dtype), frames(19)
    live = LiveVideo(net, frames=length)
    for number, frame in enumerate(clip):
        assert live.push(frame, number / 4)
        if number in (0, 2, 3, 5, 9, 18):
            first = max(0, number + 1 - length)
            torch.testing.assert_close(live.tokens(), whole(net, clip[first : number + 1]), rtol=0, atol=limit)
            assert live.frames == number + 1 - first
            assert live.span == (first / 4, number / 4)
            assert live.edges[0] == first
            assert live.edges[-1] == number + 1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_whole_window_equals_the_steps_of_its_formula_as_it_grows(dtype, limit):
    net, clip = model(dtype), frames(70)
    live = LiveVideo(net, "whole")
    same = []
    for number, frame in enumerate(clip):
        live.push(frame, float(number))
        count = number + 1
        edges = block_edges(count, 4, 4)
        assert live.edges == edges
        assert live.span == (0.0, float(number))
        if count > 20 and count % 8 and count % 7:  # a part of them, to save time
            continue
        torch.testing.assert_close(live.tokens(), by_edges(net, clip[:count], edges), rtol=0, atol=limit)
        if edges == [math.ceil(step * count / 4) for step in range(5)] or count < 4:
            torch.testing.assert_close(live.tokens(), whole(net, clip[:count]), rtol=0, atol=limit)
            same.append(count)
    assert {*range(1, 9), 16, 32, 64} <= set(same)  # N up to 2·T, and multiples of b·S


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_whole_window_has_the_steps_of_the_model_but_for_a_block(size):
    from bt_adapter.live.steps import WholeWindow

    window, config = WholeWindow(size), model(torch.float32).config
    for count in range(1, 300):
        window.add(torch.zeros(1, 2, 3))
        plan = window.plan(config, "average")
        edges = window.edges(plan)
        exact = [math.ceil(step * count / plan.steps) for step in range(plan.steps + 1)]
        late = [ours - theirs for ours, theirs in zip(edges, exact, strict=True)]
        assert min(late) >= 0
        assert max(late) < window.block
        assert window.block == 1 or window.block < count / size
        assert all(b > a for a, b in zip(edges, edges[1:], strict=False))
        assert plan.steps == min(4, math.ceil(count / window.block))


def test_whole_window_of_still_scenes_equals_one_frame_of_each():
    net, scenes = model(), frames(7)
    live = LiveVideo(net, "whole")
    for number, frame in enumerate(scenes.repeat_interleave(16, 0)):
        live.push(frame, float(number))
    torch.testing.assert_close(live.tokens(), whole(net, scenes), rtol=0, atol=1e-12)


def test_the_mean_over_a_long_stream_is_exact():
    """Running sums in float32 would lose digits: an hour at 4 frames a second has 14,400 frames."""
    from bt_adapter.live.steps import WholeWindow

    window = WholeWindow(4)
    values = torch.rand(14_400, 1, 2, 3, generator=torch.Generator().manual_seed(0)) + 100
    for value in values:
        window.add(value)
    torch.testing.assert_close(window.rows()[0, 0].double(), values.double().mean(0)[0], rtol=1e-7, atol=0)
    assert window.block == 2048


@pytest.mark.parametrize("config", [SIZES, DINO], ids=["clip", "dinov2 with registers"])
@pytest.mark.parametrize("window", ["sliding", "whole"])
def test_without_the_branch_it_is_the_mean_of_the_frames(config, window):
    net, clip = model(config=config), frames(6)
    live = LiveVideo(net, window, frames=6, branch=False)
    for number, frame in enumerate(clip):
        live.push(frame, number)
    with torch.no_grad():
        expected = net.frame_mean_tokens(net.images.prepare(clip)[None].double())[0]
    torch.testing.assert_close(live.tokens(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("long", ["average", "interpolate", "published"])
@pytest.mark.parametrize("window", ["sliding", "whole"])
def test_windows_of_more_frames_than_trained_steps(window, long):
    net, clip = model(), frames(6)
    live = LiveVideo(net, window, frames=6, long=long)
    for number, frame in enumerate(clip):
        live.push(frame, number)
    torch.testing.assert_close(live.tokens(), whole(net, clip, long=long), rtol=0, atol=1e-12)


def test_registers_and_other_preprocessing():
    net, clip = model(config=DINO), frames(5)
    images = ImageSettings(16, resize=24, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    live = LiveVideo(net, images=images)
    for number, frame in enumerate(clip):
        live.push(frame, number)
    net.images = images
    torch.testing.assert_close(live.tokens(), whole(net, clip[1:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", ["sliding", "whole"])
def test_a_frame_costs_one_pass_and_a_question_no_tower(window):
    net = model(torch.float32)
    passes, single, layers = [], [], []
    run, run_single, run_layer = net.tower.run, net.tower.run_layer, net.branch.run_layer
    net.tower.run = lambda images, *rest: passes.append(len(images)) or run(images, *rest)
    net.tower.run_layer = lambda layer, x, *rest: single.append(len(x)) or run_single(layer, x, *rest)
    net.branch.run_layer = lambda layer, z, visible, draws: (
        layers.append(visible.frames) or run_layer(layer, z, visible, draws)
    )
    live = LiveVideo(net, window)
    for number, frame in enumerate(frames(30)):
        live.push(frame, number)
        assert passes == [1] * (number + 1)
        assert single == [1] * (2 * (number + 1))  # the layers that the branch reads, depth - 1
    assert layers == []
    live.tokens()
    assert (len(passes), len(single)) == (30, 60)
    assert layers == [4, 4]  # depth - 1 layers over the trained steps


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", ["sliding", "whole"])
def test_memory_is_constant_and_known_before_the_first_frame(window, dtype, branch):
    live, clip = LiveVideo(model(dtype), window, branch=branch), frames(40)

    def held() -> int:
        parts = [value for value in vars(live._window).values() if isinstance(value, torch.Tensor)]
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
        return sum(part.nbytes for part in parts)

    state = (2 if branch else 1) * 17 * 32  # layers, CLS and patches, width
    assert live.nbytes == state * (4 * dtype.itemsize if window == "sliding" else 2 * 4 * 4 + 8)
    assert held() == 0
    for number, frame in enumerate(clip):
        live.push(frame, number)
        assert held() == live.nbytes
    assert live.kept == 40


def test_frames_are_kept_by_rate_and_forgotten_by_clear():
    net, clip = model(), frames(40)
    live = LiveVideo(net, "whole", fps=4)
    kept = [number for number, frame in enumerate(clip) if live.push(frame, 5 + number / 10)]
    assert kept == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38]
    assert (live.pushed, live.kept, live.frames) == (40, 16, 16)
    assert not live.wants(8.95)
    assert live.wants(9.0)
    torch.testing.assert_close(live.tokens(), whole(net, clip[kept]), rtol=0, atol=1e-12)
    live.clear()
    assert (live.pushed, live.kept, live.frames) == (0, 0, 0)
    for number, frame in enumerate(clip[:3]):
        assert live.push(frame, float(number))  # times may begin anew
    torch.testing.assert_close(live.tokens(), whole(net, clip[:3]), rtol=0, atol=1e-12)


def test_a_frame_that_fails_is_not_counted():
    net, clip = model(), frames(7)
    live = LiveVideo(net, "whole")
    for number, frame in enumerate(clip[:5]):
        live.push(frame, number)
    run_layer = net.tower.run_layer
    net.tower.run_layer = lambda layer, *rest: run_layer(layer, *rest) if layer < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        live.push(clip[5], 5)
    net.tower.run_layer = run_layer
    for number, frame in enumerate(clip[5:], 5):
        live.push(frame, number)
    torch.testing.assert_close(live.tokens(), whole(net, clip), rtol=0, atol=1e-12)


def test_default_window_is_what_the_branch_was_trained_with():
    assert LiveVideo(model(trained_steps=3))._window.size == 3
    assert LiveVideo(model(trained_steps=None, max_frames=64))._window.size == 8
    assert LiveVideo(model(trained_steps=None, max_frames=5))._window.size == 5


def test_bad_arguments():
    net = model()
    for options, message in (
        ({"window": "last"}, "window must be 'sliding' or 'whole', but is 'last'"),
        ({"frames": 0}, "frames must be a positive int, but is 0"),
        ({"frames": 2.0}, "frames must be a positive int, but is 2.0"),
        ({"fps": 0.0}, "fps must be a number above 0"),
        ({"fps": math.nan}, "fps must be a number above 0"),
        ({"fps": "4"}, "fps must be a number above 0, but is '4'"),
        ({"fps": 10**400}, "fps must be a number above 0"),
        ({"long": "none"}, "long must be 'average'"),
    ):
        with pytest.raises(ValueError, match=message):
            LiveVideo(net, **options)
    with pytest.raises(TypeError, match="model must be a BTAdapterVisionModel, but is str"):
        LiveVideo("mini")
    with pytest.raises(TypeError, match="branch must be a bool, but is 'no'"):
        LiveVideo(net, branch="no")
    with pytest.raises(TypeError, match="images must be ImageSettings, but is str"):
        LiveVideo(net, images="clip")
    with pytest.raises(ValueError, match="depth is 1"):
        LiveVideo(model(depth=1))
    LiveVideo(model(depth=1), branch=False).push(frames(1)[0], 0)


def test_bad_frames_and_times():
    live, frame = LiveVideo(model()), frames(1)[0]
    with pytest.raises(ValueError, match="no frame was pushed yet"):
        live.tokens()
    with pytest.raises(ValueError, match="no frame was pushed yet"):
        live.span  # noqa: B018
    for bad, kind, message in (
        (frame.float(), TypeError, "uint8 tensor .*, but is torch.float32"),
        (frame.numpy(), TypeError, "but is ndarray"),
        (frame.to_sparse(), TypeError, "but is torch.uint8, torch.sparse_coo"),
        (frame[None], ValueError, r"shape is \[1, 3, 20, 28\]"),
        (frame[:1], ValueError, r"shape is \[1, 20, 28\]"),
        (frame[:, :0], ValueError, r"shape is \[3, 0, 28\]"),
    ):
        with pytest.raises(kind, match=message):
            live.push(bad, 0.0)
    live.push(frame, 2.0)
    for time in (math.nan, math.inf, "3", None, True, 1e15, -1e15, 10**400):
        with pytest.raises(ValueError, match="time must be a finite number of seconds"):
            live.push(frame, time)
    with pytest.raises(ValueError, match="time must not go backwards, but is 1.9 after 2.0"):
        live.push(frame, 1.9)
    assert live.push(frame, 2.0)
    assert live.kept == 2


def test_frames_of_any_size_and_layout():
    net = model()
    for shape in ((1, 1), (1, 20_000), (20_000, 1), (700, 3)):
        live = LiveVideo(net)
        live.push(torch.full((3, *shape), 9, dtype=torch.uint8), 0)
        torch.testing.assert_close(live.tokens(), whole(net, torch.full((1, 3, 8, 8), 9, dtype=torch.uint8)))
    clip = frames(1)
    turned = clip[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    live = LiveVideo(net)
    live.push(turned, 0)
    torch.testing.assert_close(live.tokens(), whole(net, clip), rtol=0, atol=1e-12)


def test_rates_and_times_at_their_limits():
    frame = frames(1)[0]
    for fps, kept in (
        (1e6, [True, True, True, False]),
        (1e300, [True, True, False, False]),
        (1e-300, [True] + 3 * [False]),
    ):
        live = LiveVideo(model(torch.float32), fps=fps)
        assert [live.push(frame, time) for time in (-1e14, 0.0, 1e14, 1e14)] == kept


@pytest.mark.parametrize("window", ["sliding", "whole"])
@pytest.mark.parametrize("shape", ["mini", "24 layers of 16 x 16 patches"])
def test_real_shapes_equal_the_tokens_of_the_clip(shape, window):
    if shape == "mini":
        from bt_adapter.chat.engine import VideoChat

        net = VideoChat.mini("fresh").branch
    else:
        sizes = {"num_hidden_layers": 24, "image_size": 224, "patch_size": 14}
        net = model(torch.float32, {**SIZES, **sizes}, depth=4, trained_steps=8)
    clip, live = frames(32), LiveVideo(net, window)
    for number, frame in enumerate(clip):
        live.push(frame, number)
        if number + 1 in (3, 8, 16, 32):
            seen = clip[max(0, number - 7) : number + 1] if window == "sliding" else clip[: number + 1]
            torch.testing.assert_close(live.tokens(), whole(net, seen), rtol=0, atol=1e-5)
