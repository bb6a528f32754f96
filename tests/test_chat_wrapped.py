"""Videos heed whatever is put into or around a chat model's tower or its branch, before or after `attach`."""

from __future__ import annotations

import copy

import pytest
import torch
from chat_models import FAMILIES, LAYERS, PATCHES, attached, ids, make_branch, make_chat, videos
from torch import nn
from torch.nn.utils import parametrize

from bt_adapter.chat.attach import attach, attached_branch, detach, video_tokens
from bt_adapter.chat.families import family_of
from bt_adapter.chat.families.called_tower import CalledTower
from bt_adapter.model.video_tokens import video_tokens_streamed

# of LLaVA-NeXT stills come in pieces; its tower and method are LLaVA's
TOWERS = tuple(name for name in FAMILIES if name != "llava_next")
towers = pytest.mark.parametrize("name", TOWERS)


def as_still(chat, pixels: torch.Tensor) -> torch.Tensor:
    """What the chat model's own tower hands on of stills ``[n, 3, h, w]``, P patches each."""
    if family_of(chat).has_qformer:
        return family_of(chat).vision_tower(pixels).last_hidden_state[:, 1:]
    return torch.stack(list(chat.get_image_features(pixels).pooler_output))


def as_video(chat, pixels: torch.Tensor, branch: bool = False) -> torch.Tensor:
    """The same of videos of one frame."""
    if family_of(chat).has_qformer:
        tokens = video_tokens(chat, pixels[:, None], branch=branch)
        return family_of(chat).plain_tower.post_layernorm(tokens)[:, :PATCHES]
    found = chat.get_video_features(pixels[:, None], use_branch=branch).pooler_output
    return torch.stack(found)[:, :PATCHES]


def check_heeded(chat, before: torch.Tensor | None) -> torch.Tensor:
    """Videos of one frame without the branch are the stills; with it, half of them are. Changed from ``before``."""
    pixels = videos()[:, 0]
    with torch.no_grad():
        found = as_video(chat, pixels)
        torch.testing.assert_close(found, as_still(chat, pixels), rtol=1e-4, atol=1e-5)
        beside = as_video(chat, pixels, True)
        direct = video_tokens(chat, pixels[:, None], branch=False)
    assert (beside - found).abs().max() > 1e-3
    assert direct.shape[1] == PATCHES + 1
    if before is not None:
        assert (found - before).abs().max() > 1e-3
    return found


def twice(module, args, output):
    if isinstance(output, tuple):
        return (2 * output[0], *output[1:])
    return 2 * output


def layers_of(chat):
    return family_of(chat).plain_tower.encoder.layers


def hook_layer(chat):
    layers_of(chat)[1].register_forward_hook(twice)


def hook_attention(chat):
    layers_of(chat)[2].self_attn.register_forward_hook(twice)


def hook_linear(chat):
    layers_of(chat)[0].mlp.fc1.register_forward_hook(twice)


def hook_embeddings(chat):
    family_of(chat).plain_tower.embeddings.register_forward_hook(lambda module, args, output: output.flip(-1))


def hook_encoder_input(chat):
    layers_of(chat)[0].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def replace_layer(chat):
    old = layers_of(chat)[1].mlp.fc2
    layers_of(chat)[1].mlp.fc2 = nn.Linear(old.in_features, old.out_features)


def replace_forward(chat):
    layer = layers_of(chat)[1].mlp
    own = layer.forward
    layer.forward = lambda x: 5 * own(x)


def assign_weights(chat):
    state = {name: tensor * 1.5 for name, tensor in family_of(chat).plain_tower.state_dict().items()}
    family_of(chat).plain_tower.load_state_dict(state, assign=True)


def replace_activation(chat):
    layers_of(chat)[0].mlp.activation_fn = nn.ReLU()


def parametrise(chat):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(layers_of(chat)[2].mlp.fc1, "weight", Twice())


def eight_bits(chat):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for layer in layers_of(chat):
        old = layer.mlp.fc1
        layer.mlp.fc1 = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        layer.mlp.fc1.weight = bnb.nn.Int8Params(old.weight.detach() * 3, requires_grad=False)
        layer.mlp.fc1.bias = old.bias
        layer.mlp.fc1.to("cpu")


def four_bits(chat):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for layer in layers_of(chat):
        old = layer.mlp.fc2
        layer.mlp.fc2 = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4")
        layer.mlp.fc2.bias = old.bias
        layer.mlp.fc2.weight = bnb.nn.Params4bit(old.weight.detach() * 3, requires_grad=False, quant_type="nf4")
        layer.mlp.fc2.to("cpu")


CHANGES = (
    hook_layer, hook_attention, hook_linear, hook_embeddings, hook_encoder_input, replace_layer, replace_forward,
    assign_weights, replace_activation, parametrise, eight_bits, four_bits,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@towers
def test_changes_of_the_tower_after_attach_are_heeded(name, change):
    chat = attached(name)
    before = check_heeded(chat, None)
    change(chat)
    check_heeded(chat, before)


@pytest.mark.parametrize("change", (hook_layer, replace_forward, parametrise, eight_bits, four_bits))
@pytest.mark.parametrize("name", ["llava", "blip-2"])
def test_changes_of_the_tower_before_attach_are_heeded(name, change):
    chat = make_chat(name)
    branch = make_branch(chat, drop_path=0.0)
    before = check_heeded(attach(make_chat(name), copy.deepcopy(branch)), None)
    change(chat)
    check_heeded(attach(chat, branch), before)


@towers
def test_a_layer_that_stands_in_two_places_is_run_in_both(name):
    chat = attached(name)
    before = check_heeded(chat, None)
    layers_of(chat)[0] = layers_of(chat)[1]
    same = check_heeded(chat, before)
    chat.double().float()  # the numbers lie elsewhere now
    torch.testing.assert_close(check_heeded(chat, before), same)
    branch = make_branch(make_chat(name), drop_path=0.0)
    check_heeded(attach(detach(chat), branch, require_same_tower=False), before)


@towers
def test_a_hook_on_the_whole_branch_changes_what_it_returns(name):
    chat = attached(name)
    with torch.no_grad():
        before = video_tokens(chat, videos())
        with family_of(chat).home.bt_adapter.register_forward_hook(lambda module, given, z: 2 * z):
            changed = video_tokens(chat, videos())
        assert (changed - before).abs().max() > 1e-3
        assert torch.equal(video_tokens(chat, videos()), before)


@towers
def test_hooks_around_the_whole_tower_are_heeded(name):
    chat, calls = attached(name), []
    family_of(chat).vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    video_tokens(chat, videos())
    assert calls
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__)):
        video_tokens(chat, videos())
    assert {type(layers_of(chat)[0].mlp).__name__, "TemporalLayer"} <= set(calls)


@towers
def test_a_tower_called_gives_the_tokens_of_the_one_computed(name):
    """All frames, all layers, streamed, from stored features, with the progress of the plain tower."""
    chat = attached(name)
    pixels = videos(1, 5)
    first = attached_branch(chat).first_branch_layer
    steps: list[list] = [[], []]
    with torch.no_grad():
        expected = video_tokens(chat, pixels, lambda *step: steps[0].append(step))
        features = attached_branch(chat).tower.run(pixels[0], first)[None]
        layers_of(chat)[0].register_forward_hook(lambda *_: None)
        model = attached_branch(chat)
        assert isinstance(model.tower, CalledTower)
        model.tower.chunk = 2
        found = video_tokens(chat, pixels, lambda *step: steps[1].append(step))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert steps[0] == steps[1]
        if name != "vipllava":
            streamed = video_tokens_streamed(model, pixels[0].split(2), 5)
            torch.testing.assert_close(streamed, expected, rtol=1e-4, atol=1e-5)
            stored = model.video_tokens(features=features)
            torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.tower.run(pixels[0], first)[None], features, rtol=1e-4, atol=1e-5)


def test_states_that_do_not_come_are_an_error():
    chat = attached()
    chat.model.vision_tower.forward = lambda pixels, **_: None
    with pytest.raises(ValueError, match="output_hidden_states=True .5 with their input., but returns none"):
        video_tokens(chat, videos())
    chat = attached()
    del chat.model.vision_tower.encoder.layers[-1]
    with pytest.raises(ValueError, match="but returns 4"):
        video_tokens(chat, videos())


def loss_of(chat, pixels: torch.Tensor) -> torch.Tensor:
    tokens = ids(family_of(chat).video_length, batch=len(pixels))
    return chat(input_ids=tokens, pixel_values=pixels, labels=tokens.masked_fill(tokens == 60, -100)).loss


@pytest.mark.parametrize("name", ["llava", "vipllava", "blip-2"])
def test_gradients_reach_what_asks_for_them_in_the_tower(name):
    chat = attached(name)
    asked = layers_of(chat)[1].mlp.fc1.weight.requires_grad_()
    pixels = videos(1, 2).requires_grad_()
    loss_of(chat, pixels).backward()
    change = torch.randn_like(asked) * 1e-3
    with torch.no_grad():
        up = loss_of(chat, pixels)
        asked.add_(change)
        up = loss_of(chat, pixels)
        asked.sub_(2 * change)
        down = loss_of(chat, pixels)
    torch.testing.assert_close((asked.grad * change).sum(), (up - down) / 2, rtol=0.05, atol=1e-4)
    assert pixels.grad.abs().sum() > 0
    frozen = layers_of(chat)[1].mlp.fc2.weight
    assert frozen.grad is None


class TestPeft:
    @pytest.fixture(autouse=True)
    def _needs_peft(self):
        pytest.importorskip("peft", reason="peft is not installed")

    def wrap(self, chat, **options):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        return get_peft_model(chat, LoraConfig(r=4, init_lora_weights=False, **options))

    LAYERS = (
        r".*bt_adapter.*(fc|fc1|fc2|out_proj)", r".*(vision_tower|vision_model).*(q_proj|v_proj|qkv|fc1)",
        r".*(bt_adapter|vision_tower|vision_model).*fc2",
    )  # fmt: skip

    @pytest.mark.parametrize("layers", LAYERS)
    @pytest.mark.parametrize("name", ["llava", "vipllava", "blip-2"])
    def test_adapters_act_as_if_merged_and_learn(self, name, layers):
        wrapped = self.wrap(attached(name), target_modules=layers)
        pixels = videos()
        live = video_tokens(wrapped, pixels)
        weights = torch.randn_like(live)
        (live * weights).sum().backward()
        unreached = (f"layers.{LAYERS - 1}.", "temporal.2.", "spatial.2.")
        learning = {n: p for n, p in wrapped.named_parameters() if "lora_" in n and not any(u in n for u in unreached)}
        assert learning and all(p.grad is not None and p.grad.any() for p in learning.values())
        with torch.no_grad():
            with wrapped.disable_adapter():
                off = video_tokens(wrapped, pixels)
            merged = video_tokens(wrapped.merge_and_unload(), pixels)
        assert (live - off).abs().max() > 1e-3
        torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["llava", "blip-2"])
    def test_the_order_of_adapters_and_branch_does_not_matter(self, name):
        """Names alone, as most use them, hit the tower too. `attach` takes what PEFT returns, and what is inside."""
        expected = loss_of(self.wrap(attached(name), target_modules=["v_proj", "qkv"]), videos())
        for inside in (False, True):
            chat = make_chat(name)
            branch = make_branch(chat, drop_path=0.0)
            wrapped = self.wrap(chat, target_modules=["v_proj", "qkv"])
            assert attach(wrapped.get_base_model() if inside else wrapped, branch) is (chat if inside else wrapped)
            torch.testing.assert_close(loss_of(wrapped, videos()), expected, rtol=1e-4, atol=1e-4)
            attached_branch(wrapped).video_tokens(videos())
            loss_of(wrapped, videos()).backward()
            tower = [p for n, p in wrapped.named_parameters() if "vision" in n and "lora_B" in n and "layers.0" in n]
            assert tower and all(p.grad.any() for p in tower)

    @pytest.mark.parametrize("name", ["llava", "vipllava", "instructblip"])
    def test_a_copy_of_the_branch_that_learns_is_the_one_that_runs(self, name, tmp_path):
        chat = attached(name)
        wrapped = self.wrap(chat, target_modules=r".*language_model.*q_proj", modules_to_save=["bt_adapter"])
        pixels = videos()
        tokens = video_tokens(chat, pixels)
        weights = torch.randn_like(tokens)
        (tokens * weights).sum().backward()
        branch = family_of(chat).chat
        branch = getattr(branch, "model", branch).bt_adapter
        own, copied = branch.original_module, branch.modules_to_save["default"]
        assert not any(p.grad is not None for p in own.parameters())
        reached = [n for n, p in copied.named_parameters() if p.grad is not None and p.grad.any()]
        assert {"time", "merge_gate", "cls_token", "temporal.0.fc.weight", "spatial.1.fc2.bias"} <= set(reached)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.1)
            changed = video_tokens(chat, pixels)
            assert (changed - tokens).abs().max() > 1e-3
            with wrapped.disable_adapter():
                torch.testing.assert_close(video_tokens(chat, pixels), tokens)
            whole, streamed = attached_branch(chat), attached_branch(chat)
            torch.testing.assert_close(
                video_tokens_streamed(streamed, [pixels[0]], 4), whole.video_tokens(pixels[:1]), rtol=1e-4, atol=1e-5
            )
        # what is saved is what runs
        attached_branch(chat).save_pretrained(tmp_path)
        again = attach(make_chat(name), tmp_path)
        torch.testing.assert_close(video_tokens(again, pixels), changed, rtol=1e-4, atol=1e-5)
        # its settings too
        attached_branch(chat).recompute = "layer"
        assert copied.config.recompute == "layer" and own.config.recompute == "none"

    def test_a_copy_of_the_tower_that_learns_is_the_one_that_runs(self):
        for wrap_first in (False, True):
            chat = make_chat("llava")
            branch = make_branch(chat, drop_path=0.0)
            if not wrap_first:
                attach(chat, branch)
            wrapped = self.wrap(chat, target_modules=r".*language_model.*q_proj", modules_to_save=["vision_tower"])
            if wrap_first:
                attach(chat, branch)
            before = check_heeded(chat, None)
            copied = chat.model.vision_tower.modules_to_save["default"]
            loss_of(wrapped, videos()).backward()
            assert copied.encoder.layers[0].mlp.fc1.weight.grad.any()
            with torch.no_grad():
                copied.encoder.layers[0].mlp.fc1.weight.normal_()
            check_heeded(chat, before)

    @towers
    def test_a_copied_chat_model_has_a_branch_of_its_own(self, name):
        chat = attached(name)
        expected = video_tokens(chat, videos())
        copied = copy.deepcopy(chat)
        with torch.no_grad():
            for parameter in family_of(chat).home.bt_adapter.parameters():
                parameter.add_(0.1)
        torch.testing.assert_close(video_tokens(copied, videos()), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@towers
def test_a_model_that_accelerate_offloads_takes_videos(name, when):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    pixels = videos()
    with torch.no_grad():
        expected = [video_tokens(attached(name), pixels), as_video(attached(name), pixels[:, 0], True)]
    chat = make_chat(name)
    branch = make_branch(chat, drop_path=0.0)
    if when == "before":
        accelerate.cpu_offload(chat, execution_device="cpu")
        other = make_branch(make_chat(name, seed=1))
        with pytest.raises(ValueError, match="another CLIP"):
            attach(chat, other)
    attach(chat, branch)
    if when == "after":
        accelerate.cpu_offload(chat, execution_device="cpu")
    assert next(layers_of(chat).parameters()).is_meta
    with torch.no_grad():
        found = [video_tokens(chat, pixels), as_video(chat, pixels[:, 0], True)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_quantised_layers_of_the_branch_are_called():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    chat = attached()
    pixels = videos()
    with torch.no_grad():
        before = video_tokens(chat, pixels)
        layer = chat.model.bt_adapter.spatial[0]
        old = layer.fc1
        layer.fc1 = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4")
        layer.fc1.weight = bnb.nn.Params4bit(old.weight.detach(), requires_grad=False, quant_type="nf4")
        layer.fc1.bias = old.bias
        layer.fc1.to("cpu")
        found = video_tokens(chat, pixels)
        rounded = bnb.functional.dequantize_4bit(layer.fc1.weight, layer.fc1.weight.quant_state)
        layer.fc1 = old
        old.weight.copy_(rounded)
        torch.testing.assert_close(found, video_tokens(chat, pixels), rtol=1e-3, atol=1e-4)
    assert (found - before).abs().max() > 1e-4
