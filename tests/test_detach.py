"""The switch of a branch that is attached, and what `detach` gives back."""

from __future__ import annotations

import threading

import pytest
import torch
from chat_models import SIZE, attached, make_branch, make_chat, videos
from torch import nn

from bt_adapter.chat.attach import attach, attached_branch, branch_enabled, detach, video_tokens
from bt_adapter.chat.families import family_of
from bt_adapter.chat.families.wrapped import unwrapped
from bt_adapter.model.adapter import BTAdapterVisionModel

# state of a call, and what attach leaves behind


def test_the_switch_is_of_one_thread_and_one_model():
    chats = [attached(), attached()]
    pixels = videos()
    expected = {on: video_tokens(chats[0], pixels, branch=on) for on in (True, False)}
    assert not torch.equal(expected[True], expected[False])
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        inside.wait(30)
        found.extend((video_tokens(chats[0], pixels), video_tokens(chats[0], pixels, branch=False)))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with branch_enabled(chats[0], False):
        inside.set()
        assert done.wait(30)
        assert torch.equal(video_tokens(chats[0], pixels), expected[False])
        assert torch.equal(video_tokens(chats[0], pixels, branch=True), expected[True])
        assert torch.equal(video_tokens(chats[1], pixels), expected[True])
        with branch_enabled(chats[0], True):
            assert torch.equal(video_tokens(chats[0], pixels), expected[True])
        assert torch.equal(video_tokens(chats[0], pixels), expected[False])
        assert torch.equal(torch.stack(list(chats[0].get_image_features(pixels).pooler_output)),
                           chats[0].model.multi_modal_projector(expected[False]))  # fmt: skip
    thread.join()
    assert torch.equal(found[0], expected[True]) and torch.equal(found[1], expected[False])


def test_many_threads_with_and_without_the_branch():
    chat, pixels = attached(), videos()
    expected = {on: video_tokens(chat, pixels, branch=on) for on in (True, False)}
    wrong = []

    def work(on: bool):
        for _ in range(20):
            with branch_enabled(chat, on):
                if not torch.equal(video_tokens(chat, pixels), expected[on]):
                    wrong.append(on)

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def state_of(model: BTAdapterVisionModel) -> list:
    return [
        [(n, p.requires_grad, p.dtype, p.device, p.data_ptr()) for n, p in model.named_parameters()],
        [(n, module.training) for n, module in model.named_modules()],
        {n: t.clone() for n, t in model.state_dict().items()}, model.tower_name, model.vision_config, model.config,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llava", "blip-2"])
def test_detach_gives_the_branch_back_as_it_was(name, dtype):
    first = make_chat(name)
    branch = make_branch(first, drop_path=0.0).train()
    branch.branch.temporal[0].eval()
    branch.branch.spatial[0].fc1.weight.requires_grad_(False)
    expected, before = branch.eval().video_tokens(videos()), state_of(branch.train())
    branch.branch.temporal[0].eval()
    before = state_of(branch)
    for chat in (first.to(dtype), make_chat(name).train()):
        attach(chat, branch)
        assert family_of(chat) and attached_branch(chat).branch is branch.branch
        assert branch.branch.time.dtype == next(chat.parameters()).dtype
        video_tokens(chat, videos().to(branch.branch.time.dtype))
        detach(chat)
        after = state_of(branch)
        assert before[:2] == after[:2] and before[3:] == after[3:]
        assert all(torch.equal(after[2][n], tensor) for n, tensor in before[2].items())
    torch.testing.assert_close(branch.eval().video_tokens(videos()), expected, rtol=0, atol=0)


def test_what_was_learnt_while_attached_stays_in_the_branch():
    chat = make_chat("llava")
    branch = make_branch(chat, drop_path=0.0)
    attach(chat.half(), branch)
    with torch.no_grad():
        branch.branch.time.add_(1)
    learnt = branch.branch.time.detach().clone()
    kept = branch.branch.cls_token
    detach(chat)
    assert branch.branch.time.dtype == torch.float32 and torch.equal(branch.branch.time.half(), learnt)
    assert kept.dtype == torch.float32


def test_the_tower_of_a_branch_stays_its_own():
    chat = make_chat("llava")
    branch = make_branch(chat)
    attach(chat, branch)
    mine = {p.data_ptr() for p in branch.tower.parameters()}
    assert not mine & {p.data_ptr() for p in chat.model.vision_tower.parameters()}
    with torch.no_grad():
        chat.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
    assert not torch.equal(branch.video_tokens(videos()), video_tokens(chat, videos()))
    assert attached_branch(chat) is attached_branch(chat)  # where all is plain, nothing is made anew


def test_what_stands_in_the_branchs_place_must_hold_one():
    chat = attached()
    expected = video_tokens(chat, videos())
    chat.model.bt_adapter = nn.DataParallel(chat.model.bt_adapter)
    assert unwrapped(chat.model.bt_adapter, type(attached_branch(chat).branch)) is attached_branch(chat).branch
    assert torch.equal(video_tokens(chat, videos()), expected)
    chat.model.bt_adapter = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="bt_adapter must be a branch, or a wrapper around one, but is Linear"):
        video_tokens(chat, videos())
    assert SIZE == 24
