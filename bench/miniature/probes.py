"""Linear probes on frozen features: what of a clip's events can still be read at each place on the way to the answer.

A probe is a ridge regression on one-hot classes, solved in closed form; its strength is chosen on a held-back quarter
of the training clips. No language model is run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from miniature.chat_questions import TEMPORAL, TYPES, answers, truth, type_of
from torch import Tensor, nn

from bt_adapter import BTAdapterVisionModel
from bt_adapter.mini.clip import normalise

ALL_TOKENS = {False: "frame mean, all tokens", True: "video tokens, all tokens"}  # branch off and on
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@torch.no_grad()
def features(model: BTAdapterVisionModel, projector: nn.Module, frames: Tensor, batch: int = 32) -> dict[str, Tensor]:
    """What each place on the way holds of clips uint8 [n, T, 3, h, w]: {place: float [n, width]}.

    "pooled" is a mean over tokens, "all tokens" is every token side by side.
    """
    found: dict[str, list[Tensor]] = {}
    for part in frames.split(batch):
        pixels = normalise(part)
        mean = model.frame_mean_tokens(pixels)
        video = model.video_tokens(pixels)
        last = model(pixels).branch_tokens[:, 1:].mean(1)
        places = {
            "frame mean, pooled": mean.mean(1),
            ALL_TOKENS[False]: mean.flatten(1),
            "branch's last layer, pooled": last,
            "branch's last layer but one, pooled": (2 * video - mean)[:, :-1].mean(1),
            "video tokens, pooled": video.mean(1),
            ALL_TOKENS[True]: video.flatten(1),
            "frame mean after the projector, pooled": projector(mean).mean(1),
            "video tokens after the projector, pooled": projector(video).mean(1),
        }
        for place, value in places.items():
            found.setdefault(place, []).append(value)
    return {place: torch.cat(parts) for place, parts in found.items()}


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Weights [width, classes] of least squares with ``strength``·n·|w|²; x [n, width] standardised, y [n, classes].

    Solved in the smaller of both dimensions.
    """
    n, width = x.shape
    if width <= n:
        return torch.linalg.solve(x.T @ x + strength * n * torch.eye(width, dtype=x.dtype), x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + strength * n * torch.eye(n, dtype=x.dtype), y)


class Probe:
    """A fitted probe: standardises, multiplies, and gives a score a class."""

    def __init__(self, x: Tensor, classes: Tensor, count: int) -> None:
        """Fit on x [n, width] and classes int64 [n] of `count`; rows of a pair are neighbours and stay together."""
        self.mean, self.std = x.double().mean(0), x.double().std(0).clamp(min=1e-6)
        x, y = self._standard(x), F.one_hot(classes, count).double() - 1 / count
        cut = len(x) * 3 // 8 * 2
        shuffled = torch.randperm(len(x) // 2, generator=torch.Generator().manual_seed(0))
        order = torch.stack([2 * shuffled, 2 * shuffled + 1], 1).flatten()
        fit, held = order[:cut], order[cut:]
        right = [
            ((x[held] @ ridge(x[fit], y[fit], strength)).argmax(1) == classes[held]).sum().item()
            for strength in STRENGTHS
        ]
        self.strength = STRENGTHS[max(range(len(right)), key=right.__getitem__)]
        self.weight = ridge(x, y, self.strength)

    def _standard(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.std

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [n, classes]."""
        return self._standard(x) @ self.weight


def accuracies(
    train: Mapping[str, Tensor], train_labels: Tensor, test: Mapping[str, Tensor], test_labels: Tensor
) -> dict[str, dict[str, float]]:
    """{place: what `read` finds with probes trained and tested on that place's features}."""
    return {
        place: {
            name: value
            for kind in TYPES
            for name, value in read(kind, x, train_labels, test[place], test_labels).items()
        }
        for place, x in train.items()
    }


def read(kind: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Share right of a probe for a type of question, among all answers of the type.

    For a temporal type also "... of the pair": the better of an event and its counterpart, where 0.5 is chance.
    """
    in_train, in_test = _rows(kind, train_labels), _rows(kind, test_labels)
    right = truth(kind, test_labels[in_test])
    probe = Probe(train[in_train], truth(kind, train_labels[in_train]), len(answers(kind)))
    scores = probe(test[in_test])
    found = {kind: _share(scores.argmax(1) == right)}
    if kind in TEMPORAL:
        # the answers of a pair are neighbours
        found[f"{kind}, of the pair"] = _share(_at(scores, right) > _at(scores, right ^ 1))
    return found


def _share(right: Tensor) -> float:
    return round(right.double().mean().item(), 4)


def _at(scores: Tensor, column: Tensor) -> Tensor:
    return scores.gather(1, column[:, None])[:, 0]


def _rows(kind: str, labels: Tensor) -> Tensor:
    return type_of(labels)[kind] if kind in TEMPORAL else torch.ones(len(labels), dtype=torch.bool)
