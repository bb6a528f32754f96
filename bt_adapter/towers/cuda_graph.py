"""Record a function as a CUDA graph on its tensor's device, and replay it with one launch instead of one per kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class GraphCache:
    """A cache of CUDA graphs of functions of one tensor, with one graph per name, shape and dtype.

    A function must do the same work each time and read only its argument and tensors at fixed addresses (weights). It
    may overwrite its argument. The graphs share one pool of memory, so that many shapes take little more than the
    largest; they must not be replayed at the same time. Their buffers live as long as this object.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, name: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute ``function(x)``; the next call, with any name, overwrites the result."""
        key = (name, tuple(x.shape), x.dtype, x.device)
        if key not in self._graphs:
            self._graphs[key] = self._record(function, x)
        graph, buffer, result = self._graphs[key]
        buffer.copy_(x)
        graph.replay()
        return result

    def _record(self, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
            buffer = torch.empty_like(x).copy_(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # on their first calls libraries select kernels and allocate workspaces
                for _ in range(2):
                    function(buffer)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # threads that load data may call the CUDA runtime (pinned memory) during the capture
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function(buffer)
            self._pool = graph.pool()
        return graph, buffer, result
