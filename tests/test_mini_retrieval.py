"""Scores of the mini stack's retrieval, and its shipped CLIP."""

import math

import pytest
import torch

from bt_adapter.mini import CLIP_FOLDER, training
from bt_adapter.mini.clip import load_clip, zero_shot
from bt_adapter.mini.items import load_items
from bt_adapter.mini.retrieval import every_label, mcnemar, ranks, score
from bt_adapter.mini.scenes import MOTIONS


def test_ranks_count_strictly_greater_and_average_ties():
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.3, 0.3, 0.3], [0.2, 0.7, 0.7]])
    assert ranks(scores).tolist() == [2.0, 2.0, 1.5]


def test_ranks_of_a_constant_score_are_chance():
    assert ranks(torch.zeros(9, 9)).tolist() == [5.0] * 9


def test_mcnemar():
    first = torch.tensor([True] * 3 + [False] * 12)
    second = torch.tensor([True] * 2 + [False] + [True] * 9 + [False] * 3)
    # Nine against one discordant pairs: 2 (C(10,0) + C(10,1)) / 2^10.
    assert mcnemar(first, second) == pytest.approx(22 / 1024)
    assert mcnemar(first, second) == mcnemar(second, first)
    assert mcnemar(first, first) == 1.0


def test_score_of_perfect_and_of_motionless_embeddings():
    labels = every_label()
    texts = torch.cat([torch.nn.functional.one_hot(labels[:, i], 9).float() for i in range(3)], 1)
    figures, hits = score(texts, texts)
    assert figures["motion"] == figures["direction"] == figures["item"] == figures["text_to_video"]["R@1"] == 1.0
    assert hits["text_to_video"].all() and set(figures["by_motion"]) == set(MOTIONS)
    blind = texts.clone()
    blind[:, 18:] = 1  # knows item and colour alone: the nine motions tie
    figures, hits = score(blind, texts)
    assert figures["item"] == figures["colour"] == 1.0
    assert not hits["video_to_text"].any() and figures["video_to_text"]["mean_rank"] == 5.0


def test_contrastive_counts_every_image_of_a_caption():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    texts, which = torch.eye(2), torch.tensor([0, 0, 1])
    loss = training.contrastive(images, texts, which, torch.tensor(3.0))
    e = math.exp(3)
    forward = -math.log(e / (e + 1))
    backward = 0.5 * (-math.log(e / (2 * e + 1)) - math.log(e / (e + 2)))
    assert loss.item() == pytest.approx(forward + backward, rel=1e-5)


@pytest.mark.skipif(not (CLIP_FOLDER / "model.safetensors").exists(), reason="the mini CLIP is not trained yet")
def test_shipped_clip_knows_its_world():
    model, tokenizer = load_clip()
    scores = zero_shot(model, tokenizer, load_items("shipped"), n=480)
    assert scores["colour"] > 0.9 and scores["item"] > 0.55  # chance is 0.17 and 0.125
