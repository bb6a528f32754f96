"""What a system knows of held-out clips: choices among captions that differ in one thing alone, and retrieval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from miniature.scenes import EVENTS, KINDS, counterpart, label_number, of_kind
from miniature.tower import Clips, Replay
from torch import Tensor

from bt_adapter import BTAdapterVisionModel
from bt_adapter.mini.items import ITEMS
from bt_adapter.mini.retrieval import mcnemar
from bt_adapter.mini.scenes import COLOURS
from bt_adapter.ranking import retrieval

PLAIN = len(ITEMS) * len(COLOURS)


@torch.no_grad()
def embed(model: BTAdapterVisionModel, clips: Clips, batch: int = 48) -> Tensor:
    """Embeddings [n, F] of CLIP and branch, every token seen."""
    replay = Replay(model.eval(), clips)
    parts = []
    for start in range(0, len(clips.labels), batch):
        replay.rows = slice(start, start + batch)
        shown = clips.frames[replay.rows]
        parts.append(model(shown.float()).video_embeds)
    return torch.cat(parts)


def hits_of(videos: Tensor, texts: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Right or wrong of each clip, bool [clips of the kind], for every kind.

    videos [n, F], labels int64 [n, 3], texts [816, F] as ``text.all_captions``. A temporal kind: the clip's caption
    against its counterpart's, 1 of 2. "event": among the 16 captions of its object and colour. "object" and "colour":
    among the 8 or 6 captions that differ in it alone; "object alone": among 8 captions that name no event.
    Equal scores count as wrong.
    """
    scores = F.normalize(videos, dim=-1) @ F.normalize(texts, dim=-1).T
    told, plain = scores[:, PLAIN:].unflatten(1, (len(ITEMS), len(COLOURS), len(EVENTS))), scores[:, :PLAIN]
    item, colour, event = labels.unbind(1)
    n = torch.arange(len(labels))
    own = told[n, item, colour, event]
    against = told[n, item, colour, counterpart(event)]
    hits = {kind: (own > against)[torch.isin(event, torch.tensor(of_kind(kind)))] for kind in KINDS}
    hits["temporal"] = own > against
    hits["event"] = _first(told[n, item, colour], event)
    hits["object"] = _first(told[n, :, colour, event], item)
    hits["colour"] = _first(told[n, item, :, event], colour)
    hits["object alone"] = _first(plain.unflatten(1, (len(ITEMS), len(COLOURS)))[n, :, colour], item)
    return hits


def _first(scores: Tensor, right: Tensor) -> Tensor:
    own = scores.gather(1, right[:, None])
    return ((scores >= own).sum(1)) == 1


def figures_of(videos: Tensor, texts: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of right choices, and R@1 and R@5 both ways over all clips and all of their captions."""
    found = {name: hit.float().mean().item() for name, hit in hits_of(videos, texts, labels).items()}
    used, which = label_number(labels).unique(return_inverse=True)
    right = F.one_hot(which, len(used)).bool()
    scores = F.normalize(videos, dim=-1) @ F.normalize(texts[PLAIN:][used], dim=-1).T
    for way, matrix, marks in (("text to video", scores.T, right.T), ("video to text", scores, right)):
        result = retrieval(matrix, marks).tie_corrected
        found |= {f"{way} R@1": result.r1, f"{way} R@5": result.r5}
    return {name: round(value, 4) for name, value in found.items()}


def paired_tests(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, float]:
    """Exact two-sided McNemar p of every kind."""
    return {name: mcnemar(first[name], second[name]) for name in first}
