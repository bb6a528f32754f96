"""Stills and videos as one batch of visuals: their sizes survive copies, processes and the Trainer."""

import copy
import io
import pickle

import pytest
import torch
from chat_models import PATCHES, SIZE, ids, make_branch, make_chat, videos
from torch.utils.data import DataLoader

from bt_adapter.chat.attach import attach
from bt_adapter.chat.families import Visuals, family_of

SIZED = [None, (SIZE, 2 * SIZE), (2 * SIZE, SIZE)]


def sized_visuals() -> Visuals:
    video = videos(1)[0]
    return Visuals([video, torch.randn(3, 3, SIZE, SIZE), torch.randn(3, 3, SIZE, SIZE)], image_sizes=SIZED)


MOVES = {
    "to": lambda v: v.to("cpu"),
    "another dtype": lambda v: v.to(torch.float64),
    "accelerate": lambda v: accelerate_utils().send_to_device({"pixel_values": v}, torch.device("cpu"))["pixel_values"],
    "Trainer": lambda v: type(v)(item.to("cpu") for item in v),
    "pin_memory": lambda v: type(v)([item.clone() for item in v]),
    "rebuilt as a list": lambda v: [item.detach().clone() for item in v],
    "copy": copy.copy,
    "method copy": lambda v: v.copy(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "torch.save": lambda v: torch_saved(v),
    "slice": lambda v: v[:],
    "added": lambda v: v[:1] + v[1:],
    "worker": lambda v: next(iter(DataLoader([v], batch_size=None, num_workers=1))),
    "half and back": lambda v: v.to(torch.float16).to(torch.float32),
}


def accelerate_utils():
    return pytest.importorskip("accelerate.utils", reason="accelerate is not installed")


def torch_saved(visuals: Visuals) -> Visuals:
    buffer = io.BytesIO()
    torch.save(visuals, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_pictures_keep_their_sizes_wherever_they_go(move):
    given = sized_visuals()
    moved = Visuals.of(move(given))
    assert moved.image_sizes == SIZED and [moved.is_video(i) for i in range(3)] == [True, False, False]
    assert all(mine.shape == theirs.shape for mine, theirs in zip(moved, given, strict=True))
    torch.testing.assert_close(moved[1].float(), given[1], rtol=1e-2, atol=1e-2, check_dtype=False)


def test_only_the_picture_itself_has_its_size():
    """What is computed of a still, or is a part of it, is a plain tensor."""
    still = sized_visuals()[1]
    assert still.image_size == (SIZE, 2 * SIZE) and (still + 0).image_size == still.image_size
    for other in (still[0], still.sum(), still[:2], torch.stack([still, still])):
        assert type(other) is torch.Tensor
    plain = torch.randn(3, 3, SIZE, SIZE)
    Visuals([plain], [(SIZE, SIZE)])
    assert not hasattr(plain, "image_size")
    assert Visuals([still], [None]).is_video(0)


def test_stills_and_videos_of_one_batch_go_through_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    chat = make_chat("llava_next")
    attach(chat, make_branch(chat, drop_path=0.0))
    lengths = [family_of(chat).image_length(*size) if size else PATCHES + 1 for size in SIZED]
    tokens = ids(*lengths, batch=2)
    labels = tokens.masked_fill(tokens == 60, -100)
    batch = {"input_ids": tokens, "labels": labels, "pixel_values": sized_visuals() + sized_visuals()}
    expected = chat(**batch).loss.item()
    options = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=chat, args=options, train_dataset=[0, 1], data_collator=lambda _: batch)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_visuals_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"items\[0\]"):
        Visuals([3])
    with pytest.raises(ValueError, match=r"items\[1\].*\[2, 2\]"):
        Visuals([torch.zeros(3, 2, 2), torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="image_sizes"):
        Visuals([torch.zeros(3, 2, 2)], [None, None])
    chat = make_chat("llava_next")
    attach(chat, make_branch(chat))
    with pytest.raises(ValueError, match=r"image_sizes must have \(height, width\)"):
        chat.get_image_features(Visuals([torch.zeros(3, 24, 24)]), None)
    assert Visuals([torch.zeros(3, 2, 2)]).to(torch.float64)[0].dtype == torch.float64
