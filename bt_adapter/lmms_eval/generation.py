"""The generation options of lmms-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Options without effect on a greedy answer, whatever their values.
_OF_SAMPLING = ("top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Generation:
    """How an answer is generated.

    max_new_tokens: most tokens. until: texts at the first of which the answer is cut.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Return the text before the first of the stop texts, without white space around it."""
        places = [place for stop in self.until if stop and (place := text.find(stop)) >= 0]
        return text[: min(places)].strip() if places else text.strip()


def read_generation(options: Mapping[str, Any], max_new_tokens: int) -> Generation:
    """Read the ``generation_kwargs`` of a task; answers are greedy.

    max_new_tokens: where the task names no number.

    Raises:
        ValueError: an option that asks for samples or beams, or one that is not known.
    """
    given = dict(options)
    until, length = given.pop("until", None), given.pop("max_new_tokens", None)
    samples, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    if samples or temperature and samples is None:
        raise ValueError(f"answers are greedy, but the task asks for do_sample {samples}, temperature {temperature}")
    if (beams := given.pop("num_beams", None)) not in (None, 1):
        raise ValueError(f"answers are greedy, but the task asks for num_beams {beams}")
    if (shape := given.pop("image_aspect_ratio", None)) not in (None, "original"):
        raise ValueError(
            f"image_aspect_ratio must be original (pictures are cut by the model's processor), but is {shape}"
        )
    for name in _OF_SAMPLING:
        given.pop(name, None)
    if given:
        raise ValueError(f"generation_kwargs {', '.join(sorted(given))}: not supported")
    length = max_new_tokens if length is None else length
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"max_new_tokens must be a positive int, but is {length!r}")
    stops = () if until is None else (until,) if isinstance(until, str) else tuple(until)
    return Generation(length, stops)
