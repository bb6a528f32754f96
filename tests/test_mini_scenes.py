"""Scenes, items and tokenizer of the mini stack."""

import pytest
import torch

from bt_adapter.mini.clip import make_clip, text_embeds, unique_labels
from bt_adapter.mini.items import ITEMS, SHIPPED_PER_CLASS, load_items
from bt_adapter.mini.retrieval import every_label
from bt_adapter.mini.scenes import (
    COLOURS,
    MOTIONS,
    OPPOSITE,
    SIZE,
    TEMPLATES,
    Label,
    caption,
    clips,
    random_labels,
    stills,
    to_labels,
    trails,
)
from bt_adapter.mini.tokenizer import CONTEXT, make_tokenizer


@pytest.fixture(scope="module")
def items():
    return load_items("shipped")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(motion: str, n: int = 4) -> torch.Tensor:
    labels = random_labels(n, True, seeded(5))
    labels[:, 2] = MOTIONS.index(motion)
    return labels


def light(frames: torch.Tensor, dim: int) -> torch.Tensor:
    """Centre of what differs from the background along one axis of [n, T, 3, h, w]."""
    lit = (frames.float().amax(2) - 80).relu()
    return (lit.sum(2 if dim == 3 else 3) * torch.arange(SIZE)).sum(-1) / lit.sum((2, 3)).clamp(min=1)


def test_shipped_items(items):
    assert items.images.shape == (len(ITEMS) * SHIPPED_PER_CLASS, 28, 28) and items.images.dtype == torch.uint8
    assert items.labels.bincount().tolist() == [SHIPPED_PER_CLASS] * len(ITEMS)
    drawn = items.draw(torch.tensor([3, 3, 7]), seeded())
    for image, item in zip(drawn, (3, 3, 7), strict=True):
        same = (items.images == image).flatten(1).all(1)
        assert items.labels[same].tolist() == [item]


def test_items_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_items("train", tmp_path)
    with pytest.raises(ValueError, match="split is 'dev'"):
        load_items("dev")


@pytest.mark.parametrize("make", [stills, trails])
def test_images(items, make):
    images, labels = make(items, 12, seeded())
    again, same = make(items, 12, seeded())
    assert images.shape == (12, 3, SIZE, SIZE) and images.dtype == torch.uint8 and labels.shape == (12, 3)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert (labels[:, 2] >= 0).all() if make is trails else (labels[:, 2] == -1).all()
    assert images.flatten(1).float().std(1).min() > 3


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_clips(items, frames):
    videos, labels = clips(items, 6, frames, seeded())
    assert videos.shape == (6, frames, 3, SIZE, SIZE) and videos.dtype == torch.uint8
    assert labels.min() >= 0 and (labels < torch.tensor([len(ITEMS), len(COLOURS), len(MOTIONS)])).all()


@pytest.mark.parametrize("motion", MOTIONS)
def test_opposites_are_time_reversals(items, motion):
    forward, _ = clips(items, 4, 8, seeded(), labels_of(motion))
    backward, _ = clips(items, 4, 8, seeded(), labels_of(MOTIONS[OPPOSITE[MOTIONS.index(motion)]]))
    assert torch.equal(forward.flip(1), backward)
    assert torch.equal(forward, backward) == (motion == "still")


def test_motions_move(items):
    for motion, dim, sign in (("right", 4, 1), ("left", 4, -1), ("down", 3, 1), ("up", 3, -1)):
        videos, _ = clips(items, 16, 8, seeded(1), labels_of(motion, 16))
        centre = light(videos, 3 if dim == 4 else 4)
        assert ((centre[:, -1] - centre[:, 0]) * sign > 3).float().mean() > 0.9, motion
    still, _ = clips(items, 4, 8, seeded(), labels_of("still"))
    assert (still == still[:, :1]).all()


def test_captions_differ():
    captions = {caption(label) for label in to_labels(every_label())}
    assert len(captions) == 432
    assert caption(Label(5, 0, 1)) == "a red sneaker moving left"
    assert (
        caption((5, 0, -1), 2) == caption(Label(5, 0)).replace("a ", "a photo of a ", 1) == "a photo of a red sneaker"
    )


def test_tokenizer_knows_every_word():
    tokenizer = make_tokenizer()
    every = [caption(label, t) for label in to_labels(every_label()) for t in range(len(TEMPLATES))]
    tokens = tokenizer(every)["input_ids"]
    assert max(map(len, tokens)) <= CONTEXT
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in tokens)
    assert not any(tokenizer.unk_token_id in row for row in tokens)
    assert len(set(map(tuple, tokens))) == len(set(every))


def test_text_is_pooled_at_the_end_of_the_caption():
    """Padding after [EOS] changes nothing, and the last word does."""
    torch.manual_seed(0)
    model, tokenizer = make_clip()
    model.eval()
    with torch.no_grad():
        alone = text_embeds(model, tokenizer, ["a red sneaker"])
        padded = text_embeds(model, tokenizer, ["a red sneaker", "a photo of a red sneaker moving left"])
        other = text_embeds(model, tokenizer, ["a red boot"])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)  # float32, other padding, other summation order
    assert (alone - other).abs().max() > 1e-2


def test_unique_labels():
    labels = torch.tensor([[1, 0, -1], [0, 0, 2], [1, 0, -1]])
    different, which = unique_labels(labels)
    assert len(different) == 2 and torch.equal(different[which], labels)
