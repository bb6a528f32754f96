"""Bad input to the ops: an error that names the argument, says what came and what was expected."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORM, VARIANT, VARIANTS

import bt_kernels
from bt_kernels import VisibleTokens
from bt_kernels._cases import Variant

FORM_NAME = "tube70"  # B 2, P 10, T 4, K 4, N 16; D 8, heads 2
BY_NAME = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
OF_VISIBLE = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.takes_visible], ids=lambda v: v.name)
TENSORS = [
    pytest.param(variant, name, id=f"{variant.name}-{name}")
    for variant in VARIANTS
    for name, tensor in variant.draw(FORM[FORM_NAME].build()).items()
    if tensor is not None
]


def refused(variant: Variant, changed: dict, error: type | tuple, *words: object, visible=None) -> str:
    """Call the op with some arguments changed; it must raise, and the message must hold every word."""
    good = FORM[FORM_NAME].build()
    arguments = {**variant.draw(good), **changed}
    if variant.takes_visible:
        arguments["visible"] = good if visible is None else visible
    with pytest.raises(error) as raised:
        getattr(bt_kernels, variant.function)(**variant.arguments(arguments))
    message = str(raised.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"
    return message


def good(variant: Variant, name: str) -> torch.Tensor:
    return variant.draw(FORM[FORM_NAME].build())[name]


@pytest.mark.parametrize("variant, name", TENSORS)
def test_wrong_rank(variant, name):
    if (variant.function, name) == ("bias_gelu", "x"):
        pytest.skip("takes any number of dimensions")
    tensor = good(variant, name)
    refused(variant, {name: tensor[None]}, ValueError, name, [1, *tensor.shape], tensor.ndim)
    refused(variant, {name: tensor.flatten() if tensor.ndim > 1 else tensor[0]}, ValueError, name)


@pytest.mark.parametrize("variant, name", TENSORS)
def test_not_a_tensor(variant, name):
    refused(variant, {name: good(variant, name).tolist()}, TypeError, name, "list", "tensor")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("variant, name", TENSORS)
def test_not_floating_point(variant, name, dtype):
    refused(variant, {name: good(variant, name).to(dtype)}, TypeError, name, dtype, "float")


# the tower's tokens, where the branch may have another dtype
OF_ANY_DTYPE = {
    "gather_embed": "backbone", "gather_merge": "backbone", "pool_video_tokens": "backbone", "alignment_loss": "target"
}  # fmt: skip


@pytest.mark.parametrize("variant, name", TENSORS)
def test_dtype_mismatch(variant, name):
    free = OF_ANY_DTYPE.get(variant.function)
    tensors = [key for key, t in variant.draw(FORM[FORM_NAME].build()).items() if t is not None and key != free]
    if len(tensors) == 1 or name == free:
        pytest.skip("no other tensor must have its dtype")
    if not variant.takes_visible:
        pytest.skip("takes tensors of different dtypes")
    if name == tensors[0] and variant.op == "spatial_attention":
        pytest.skip("float32 weights go with every dtype, so there is no mismatch to see in qkv")
    message = refused(variant, {name: good(variant, name).half()}, TypeError, "float16")
    assert (name if name != tensors[0] else tensors[1]) in message


@pytest.mark.parametrize("variant, name", TENSORS)
def test_device_mismatch(variant, name):
    """A meta tensor stands in for one on another device."""
    tensors = [key for key, t in variant.draw(FORM[FORM_NAME].build()).items() if t is not None]
    if len(tensors) == 1 and not variant.takes_visible:
        pytest.skip("takes one tensor")
    message = refused(variant, {name: good(variant, name).to("meta")}, ValueError, "meta", "cpu")
    assert name in message or (name == tensors[0] and "visible" in message)


@OF_VISIBLE
def test_visible_on_another_device(variant):
    refused(variant, {}, ValueError, "visible", "meta", "cpu", visible=FORM[FORM_NAME].build().to("meta"))


@OF_VISIBLE
def test_visible_for_another_batch(variant):
    other = VisibleTokens.tube(3, 10, 4, 0.7)
    refused(variant, {}, ValueError, 3, 2, visible=other)


@OF_VISIBLE
def test_visible_is_something_else(variant):
    refused(variant, {}, (TypeError,), "visible", "VisibleTokens", visible=FORM[FORM_NAME].build().index)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    refused(variant, {}, (TypeError,), "visible", "Tensor", visible=mask)


@OF_VISIBLE
def test_another_number_of_visible_tokens(variant):
    """As many tokens as the branch has rows; ops without branch rows see another number of patches."""
    more = VisibleTokens.tube(2, 10, 4, 0.5)
    if variant.function == "gather_embed":
        refused(variant, {}, ValueError, "backbone", 12, [2, 4, 11, 8], visible=VisibleTokens.tube(2, 11, 4, 0.7))
        return
    name = "qkv" if "attention" in variant.op else "branch"
    refused(variant, {}, ValueError, name, more.tokens + (variant.op != "temporal_attention"), visible=more)


@pytest.mark.parametrize("name", ["gather_embed", "gather_merge", "alignment_loss", "pool_video_tokens"])
def test_another_number_of_patches(name):
    variant = VARIANT[name]
    tower = "target" if name == "alignment_loss" else "backbone"
    refused(variant, {tower: good(variant, tower)[:, :, :-1]}, ValueError, tower, [2, 4, 10, 8], 11)


@pytest.mark.parametrize("name", ["gather_embed", "gather_merge", "alignment_loss"])
def test_another_number_of_frames(name):
    variant = VARIANT[name]
    tower = "target" if name == "alignment_loss" else "backbone"
    refused(variant, {tower: good(variant, tower)[:, :-1]}, ValueError, tower, [2, 3, 11, 8], 4)


def test_pooling_of_padded_videos_wants_the_same_frames():
    visible = FORM["padded"].build()
    variant = VARIANT["pool_video_tokens"]
    inputs = variant.draw(visible)
    refused(
        variant,
        {**inputs, "backbone": inputs["backbone"][:, :-1]},
        ValueError,
        "backbone",
        5,
        visible=visible,
    )


@pytest.mark.parametrize(
    "name, argument",
    [
        ("gather_embed", "cls_token"),
        ("gather_embed", "pos"),
        ("gather_embed", "time"),
        ("gather_merge", "branch"),
        ("gather_merge", "gate"),
        ("alignment_loss", "target"),
        ("alignment_loss", "head_weight"),
        ("alignment_loss", "head_bias"),
        ("alignment_loss", "head_norm_weight"),
        ("alignment_loss", "head_norm_bias"),
        ("alignment_loss", "target_norm_weight"),
        ("alignment_loss", "target_norm_bias"),
        ("alignment_loss", "target_projection"),
        ("alignment_loss-biased", "target_projection_bias"),
        ("pool_video_tokens", "branch"),
        ("residual_norm", "update"),
        ("residual_norm", "weight"),
        ("residual_norm", "bias"),
        ("bias_gelu", "bias"),
        ("linear_add", "weight"),
        ("linear_add", "bias"),
        ("linear_add", "stream"),
        ("mlp", "fc1_weight"),
        ("mlp", "fc1_bias"),
        ("mlp", "fc2_weight"),
        ("mlp", "fc2_bias"),
        ("mlp", "stream"),
    ],
)
def test_another_number_of_channels(name, argument):
    variant = VARIANT[name]
    tensor = good(variant, argument)[..., :-1]
    refused(variant, {argument: tensor}, ValueError, argument, list(tensor.shape), tensor.shape[-1] + 1)


def test_update_of_more_rows_and_scale_without_update():
    variant = VARIANT["residual_norm-patches"]
    update = good(variant, "update")
    longer = update.repeat(1, 2, 1)
    refused(variant, {"update": longer}, ValueError, "update", list(longer.shape), update.shape[1] + 1)
    refused(variant, {"scale": good(variant, "scale")[:, :-1]}, ValueError, "scale", [2, 11], 12)
    refused(variant, {"update": None}, ValueError, "scale", "update")
    refused(variant, {"dtype": torch.int32}, TypeError, "dtype", torch.int32)
    refused(variant, {"bias": good(variant, "bias").half()}, TypeError, "bias", "weight", "float16")


def test_stream_of_fewer_rows_and_scale_of_other_rows():
    for name in ("linear_add-patches", "mlp-scale"):
        stream = good(VARIANT[name], "stream")[:, 2:]
        refused(VARIANT[name], {"stream": stream}, ValueError, "stream", list(stream.shape), stream.shape[1] + 1)
        scale = good(VARIANT[name], "scale")[:, :-1]
        refused(VARIANT[name], {"scale": scale}, ValueError, "scale", list(scale.shape), scale.shape[1] + 1)


def test_unknown_activation():
    for act in ("silu", None):
        refused(VARIANT["mlp"], {"act": act}, ValueError, "act", repr(act), "quick_gelu")
        refused(VARIANT["bias_gelu-no-bias"], {"act": act}, ValueError, "act", repr(act), "quick_gelu")


def test_gate_of_one_number_or_per_token():
    variant = VARIANT["gather_merge"]
    refused(variant, {"gate": torch.tensor(0.5, dtype=torch.float64)}, ValueError, "gate", "[D]", [])
    refused(variant, {"gate": torch.ones(1, dtype=torch.float64)}, ValueError, "gate", [1], 8)
    refused(variant, {"gate": torch.ones(17, 8, dtype=torch.float64)}, ValueError, "gate", [17, 8])


def test_position_and_time_tables_too_short():
    variant = VARIANT["gather_embed"]
    refused(variant, {"pos": good(variant, "pos")[:-1]}, ValueError, "pos", [10, 8], 11)
    refused(variant, {"time": good(variant, "time")[:3]}, ValueError, "time", 3, 4)


@pytest.mark.parametrize("name", ["temporal_attention", "spatial_attention"])
def test_qkv_not_packed_by_three(name):
    variant = VARIANT[name]
    qkv = good(variant, "qkv")
    refused(variant, {"qkv": qkv[:, :, :2]}, ValueError, "qkv", list(qkv[:, :, :2].shape), 3)
    refused(variant, {"qkv": qkv.movedim(2, 3)}, ValueError, "qkv")


@pytest.mark.parametrize("size", [(2, 3), (2, 5), (1, 4), (3, 4)], ids=str)
def test_frame_weight_of_another_shape(size):
    weight = torch.ones(size, dtype=torch.float64)
    refused(
        VARIANT["spatial_attention-weighted"],
        {"frame_weight": weight},
        ValueError,
        "frame_weight",
        list(size),
        4,
    )


def test_alignment_projection_to_another_width():
    variant = VARIANT["alignment_loss"]
    projection = good(variant, "target_projection")[:-1]
    refused(variant, {"target_projection": projection}, ValueError, "target_projection", [5, 8], 6)


@BY_NAME
def test_unknown_backend(variant):
    refused(variant, {"backend": "opencl"}, ValueError, "opencl", "reference", "cuda")


@pytest.mark.parametrize("place", [40, 400, -2, 2**40])
def test_index_out_of_range(place):
    index = FORM[FORM_NAME].build().index.clone()
    index[1, 3] = place
    for slots in (4, None):
        with pytest.raises(ValueError, match="index") as error:
            VisibleTokens(index, 10, 4, slots).validate()
        assert str(place) in str(error.value) and "40" in str(error.value)


def test_padding_in_a_grid_or_before_a_token():
    index = torch.tensor([[0, 1, -1, 3]])
    with pytest.raises(ValueError, match="index"):
        VisibleTokens(index, 2, 2, slots=2).validate()
    with pytest.raises(ValueError, match="-1 only at the end"):
        VisibleTokens(index, 2, 2).validate()
    VisibleTokens(torch.tensor([[0, 1, 3, -1]]), 2, 2).validate()


@pytest.mark.parametrize(
    "index",
    [
        torch.zeros(2, 4),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
        [[0, 1]],
        None,
    ],
    ids=["float", "int32", "1-d", "list", "none"],
)
def test_index_of_another_type_or_rank(index):
    with pytest.raises((ValueError, TypeError), match="index"):
        VisibleTokens(index, 2, 2)


@pytest.mark.parametrize("name", ["patches", "frames", "slots"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
def test_counts_of_another_type_or_sign(name, value):
    arguments = {"patches": 2, "frames": 2, "slots": 2, name: value}
    with pytest.raises((ValueError, TypeError), match=name) as error:
        VisibleTokens(torch.zeros(1, 4, dtype=torch.int64), **arguments)
    assert str(value) in str(error.value) or type(value).__name__ in str(error.value)


def test_slots_that_do_not_divide_the_rows():
    with pytest.raises(ValueError, match="slots") as error:
        VisibleTokens(torch.zeros(1, 4, dtype=torch.int64), 2, 2, slots=3)
    assert "4" in str(error.value) and "3" in str(error.value)


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor([1.0, 2.0]),
        torch.tensor([True, False]),
        torch.tensor([1]),
        torch.tensor([[1, 2]]),
        torch.tensor(2),
    ],
    ids=["float", "bool", "short", "2-d", "0-d"],
)
def test_frame_counts_of_another_type_or_shape(counts):
    with pytest.raises((ValueError, TypeError), match="frame_counts"):
        VisibleTokens.random(2, 4, 3, 0.5, frame_counts=counts)
    with pytest.raises((ValueError, TypeError), match="frame_counts"):
        VisibleTokens(torch.zeros(2, 4, dtype=torch.int64), 4, 3, frame_counts=counts)


@pytest.mark.parametrize("counts", [[4, 1], [-1, 1]])
def test_frame_counts_out_of_range(counts):
    index = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="frame_counts"):
        VisibleTokens(index, 4, 3, frame_counts=torch.tensor(counts)).validate()


def test_frame_counts_are_not_for_a_grid():
    with pytest.raises(ValueError, match="frame_counts"):
        VisibleTokens(torch.zeros(2, 4, dtype=torch.int64), 4, 3, slots=2, frame_counts=torch.tensor([1, 2]))


def test_frame_counts_on_another_device():
    with pytest.raises(ValueError, match="frame_counts"):
        VisibleTokens(torch.zeros(2, 4, dtype=torch.int64), 4, 3, frame_counts=torch.ones(2, device="meta").long())


def test_tokens_of_padding_frames_are_out_of_range():
    """With two real frames, a row of frame 2 names a token that does not count."""
    with pytest.raises(ValueError, match="index"):
        VisibleTokens(torch.tensor([[2]]), 4, 3, frame_counts=torch.tensor([2])).validate()


def test_a_token_named_twice():
    with pytest.raises(ValueError, match="index"):
        VisibleTokens(torch.tensor([[3, 3]]), 4, 3).validate()


@pytest.mark.parametrize("ratio", ["0.5", None, True])
@pytest.mark.parametrize("name", ["tube", "random"])
def test_ratio_of_another_type(name, ratio):
    with pytest.raises((TypeError, ValueError), match="ratio"):
        getattr(VisibleTokens, name)(1, 4, 2, ratio)


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.zeros(2, 8), ("bool", "float32")),
        (torch.zeros(8, dtype=torch.bool), ("[8]",)),
        ([[False] * 8], ("list",)),
        (torch.zeros(2, 9, dtype=torch.bool), ("9", "2")),
        (torch.tensor([[True, False, False, False]]), ("3", "2")),
        (torch.tensor([[True, True, False, False], [False] * 4]), ("[2, 4]",)),
    ],
    ids=["float", "1-d", "list", "frames do not divide it", "odd number left", "uneven"],
)
def test_reference_mask_that_makes_no_grid(mask, words):
    with pytest.raises((ValueError, TypeError), match="mask") as error:
        VisibleTokens.from_reference_mask(mask, 2)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("counts", [[5, 2], [-1, 2]])
def test_random_with_frame_counts_out_of_range(counts):
    for value in (counts, torch.tensor(counts)):
        with pytest.raises(ValueError, match=r"frame_counts must lie in \[0, 2\]"):
            VisibleTokens.random(2, 4, 2, 0.0, frame_counts=value)


def test_frame_counts_of_another_type():
    with pytest.raises(TypeError, match="frame_counts must be an int tensor"):
        VisibleTokens(torch.zeros(2, 1, dtype=torch.int64), 4, 3, frame_counts=[1, 2])
    narrow = VisibleTokens(torch.zeros(2, 1, dtype=torch.int64), 4, 3, frame_counts=torch.tensor([1, 2]).int())
    assert narrow.frame_counts.dtype == torch.int64
