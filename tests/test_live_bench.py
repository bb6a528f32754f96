"""The count of a live frame's work on a GPU is that of its layers, and the hour's row is made as it says."""

import live
import torch
from test_answer import make_engine


def test_counted_work_of_a_frame_is_that_of_the_towers_layers():
    push, tokens = live.counted()
    layers, width, rows, patches = 23, 1024, 257, 256  # of ViT-L/14, all but the last layer
    products = layers * 24 * width**2 * rows + 2 * patches * 3 * 14 * 14 * width
    attention = layers * 4 * rows**2 * width
    assert push.tflop * 1e12 == products + attention
    assert push.needed_tflop_per_s == 30 * push.tflop
    assert 0 < push.share["H100 SXM"] < 1
    assert tokens.tflop > push.tflop  # three branch layers over eight steps


def test_an_hour_of_few_frames(monkeypatch):
    chat = make_engine()
    chat.branch.trained_steps = 4
    monkeypatch.setattr(live, "pool", lambda: list(torch.randint(256, (7, 3, 20, 20), dtype=torch.uint8)))
    row = live.watch_hour(chat, "sliding", 160)
    assert len(row.push_ms) == len(row.rss) == len(row.answer_s) == 10
    assert row.error < 1e-6
    assert row.rss_growth == row.rss[-1] / row.rss[0] - 1
