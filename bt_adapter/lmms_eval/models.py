"""The two classes of lmms-eval's models: one for chat messages, one for a text and its visuals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from bt_adapter.chat.settings import ChatModel
from bt_adapter.lmms_eval.answering import Answerer
from bt_adapter.lmms_eval.conversations import Asked, read_context, read_messages
from bt_adapter.lmms_eval.generation import read_generation


class _Model(lmms):
    """The base of both classes.

    Args:
        pretrained: the model, as ``--model`` of ``bt-adapter answer`` names it.
        batch_size: requests that are answered at once.
        device: "auto" (with torchrun, a GPU for each process), "cpu" or "cuda".
        options: further options of ``bt-adapter answer`` under their names in Python: ``branch``, ``frames``, ``fps``,
            ``long``, ``windows``, ``no_branch``, ``dtype``, ``quantize``, ``max_new_tokens`` and others. Videos with
            fewer frames are repeated, unless ``no_repeat`` is True.

    Raises:
        TypeError: an option that does not exist. CommandError: a wrong value, or a model that cannot be loaded.
    """

    def __init__(
        self, pretrained: str = "mini", batch_size: int | str = 1, device: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        options.pop("max_batch_size", None)  # lmms-eval passes its own default of a search for a batch size
        known = {field.name for field in fields(ChatModel)} - {"model", "device"}
        if unknown := sorted(set(options) - known):
            raise TypeError(f"model_args {', '.join(unknown)}: not known; known are {', '.join(sorted(known))}")
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        options.setdefault("repeat", not options.get("no_repeat", False))
        command = ChatModel(model=pretrained, device=_device(device), **options)
        self.max_new_tokens = command.max_new_tokens
        self.answerer = Answerer.load(command, int(batch_size))

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.answerer.chat.device

    @property
    def batch_size(self) -> int:
        """Requests that are answered at once."""
        return self.answerer.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer all requests, in their order."""
        size = self.batch_size
        results: list[GenerationResult] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for start in range(0, len(requests), size):
                part = [request.args for request in requests[start : start + size]]
                asked = [self._asked(arguments) for arguments in part]
                options = [read_generation(self._options(arguments), self.max_new_tokens) for arguments in part]
                for arguments, (text, tokens) in zip(part, self.answerer.answer(asked, options), strict=True):
                    results.append(GenerationResult(text, TokenCounts(input_tokens=tokens)))
                    self.cache_hook.add_partial("generate_until", (arguments[0], self._options(arguments)), text)
                bar.update(len(part))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise NotImplementedError: only generated answers are supported."""
        raise NotImplementedError("bt_adapter generates answers; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise NotImplementedError: only tasks of one round are supported."""
        raise NotImplementedError("bt_adapter answers tasks of one round; tasks of several rounds are not supported")

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        raise NotImplementedError

    def _options(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        raise NotImplementedError

    def _document(self, arguments: tuple[Any, ...]) -> Any:
        number, task, split = arguments[3:6]
        return self.task_dict[task][split][number]


class BTAdapterChat(_Model):
    """The model for tasks with chat messages, which may hold several videos and stills and earlier turns."""

    is_simple = False

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        messages = ChatMessages(messages=arguments[1](self._document(arguments))).messages
        return read_messages([message.model_dump() for message in messages])

    def _options(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        return dict(arguments[2])


class BTAdapterSimple(_Model):
    """The model for tasks with a text and a list of visuals (``--force_simple``)."""

    is_simple = True

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        return read_context(arguments[0], arguments[2](self._document(arguments)))

    def _options(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        return dict(arguments[1])


def _device(name: str | None) -> str:
    """Return the device of this process: with several processes and GPUs, one GPU for each."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local is not None else str(name)
