"""Computes action recognition: the class whose name is most similar to the video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.data.clips import Clip
from bt_adapter.errors import CommandError
from bt_adapter.eval.features import Features
from bt_adapter.eval.ranking import ranks, tie_corrected
from bt_adapter.eval.retrieval import Encode, encode_all

# The published scores compare videos with the bare names.
TEMPLATES = ("{}",)


def read_templates(path: Path | None) -> tuple[str, ...]:
    """Read templates from a text file, one per line with {} in place of the class name; None: the bare name.

    Raises:
        CommandError: the file is unreadable or empty, or a line does not hold {} exactly once.
    """
    if path is None:
        return TEMPLATES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--templates {path}: cannot be read ({error})") from error
    templates = tuple(line.strip() for line in lines if line.strip())
    for template in templates:
        if template.count("{}") != 1:
            raise CommandError(f"--templates {path}: each line must hold {{}} once, but one is {template!r}")
    if not templates:
        raise CommandError(f"--templates {path}: holds no template; write one per line, with {{}} for the class name")
    return templates


def class_vectors(names: Sequence[str], templates: Sequence[str], encode: Encode) -> Tensor:
    """Embed classes as unit vectors ``[C, F]``: the normalised mean of their texts' unit vectors over the templates."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    return F.normalize(encode_all(texts, encode).unflatten(0, (len(names), -1)).mean(1), dim=-1)


def figures(
    features: Features, clips: Sequence[Clip], names: Sequence[str], templates: Sequence[str], encode: Encode
) -> dict[str, Any]:
    """Compute all reported metrics; top-1 counts clips where no other class scores strictly higher, as in ``ranks``.

    "tie_corrected": the same shares if half of the classes with an equal score are ranked before the correct one.
    """
    labels = torch.tensor([clips[number].label for number in features.kept])
    right = F.one_hot(labels, len(names)).bool()
    classes = class_vectors(names, templates, encode).to(features.vectors.device)
    place, equal = ranks(features.vectors @ classes.T, right)
    hit = (place <= 1).double()
    of_class = torch.stack([(right * hit[:, None]).sum(0), right.sum(0)])  # [2, C]: hits and clips of each
    seen = of_class[1] > 0
    accuracy = of_class[0, seen] / of_class[1, seen]
    shown = [name for name, there in zip(names, seen.tolist(), strict=True) if there]
    return {
        "classes": len(names),
        "classes_with_clips": len(shown),
        "templates": list(templates),
        "top1": hit.mean().item(),
        "top5": (place <= 5).double().mean().item(),
        "mean_class_accuracy": accuracy.mean().item(),
        "tied": int((equal > 0).sum()),
        "tie_corrected": {f"top{k}": (tie_corrected(place, equal) <= k).double().mean().item() for k in (1, 5)},
        "by_class": dict(zip(shown, accuracy.tolist(), strict=True)),
    }


def rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and rows of the result table."""
    shares = [result[key] for key in ("top1", "top5", "mean_class_accuracy")]
    shares += [result["tie_corrected"][key] for key in ("top1", "top5")]
    head = ["%", "top-1", "top-5", "mean of classes", "top-1,\ntie-corrected", "top-5,\ntie-corrected", "tied"]
    return head, [[f"{result['classes']} classes", *(f"{100 * share:.1f}" for share in shares), str(result["tied"])]]
