"""A function recorded once and replayed: one launch in the place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Recorded:
    """CUDA graphs of functions of one tensor, one graph for each name, shape and dtype.

    A function must do the same work each time, read nothing but its argument and what stays where it is (weights), and
    may write over its argument. Each graph keeps its buffers for as long as this object lives.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, name: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, in memory that the next call with this name overwrites."""
        key = (name, tuple(x.shape), x.dtype, x.device)
        if key not in self._graphs:
            self._graphs[key] = self._record(function, x)
        graph, place, result = self._graphs[key]
        place.copy_(x)
        graph.replay()
        return result

    @staticmethod
    def _record(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        place = x.clone()
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):  # libraries choose and allocate what they need on the first calls
            for _ in range(2):
                function(place)
        torch.cuda.current_stream(x.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(place)
        return graph, place, result
