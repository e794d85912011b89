"""A compiled step on a GPU, recorded once as a CUDA graph and replayed: one launch where each kernel had its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replay:
    """Calls a function of CUDA tensors: as it is, then recorded, then replayed, while its tensors stay in their places.

    Args:
        run: takes tensors, edits some of them, returns tensors. What waits for the device cannot be recorded, and then
            every call is made as it is.
        moving: how many of its last arguments are other tensors in each call, such as a batch of images. They are
            copied to where the recorded kernels read. When one of the others has moved, the call after records anew.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], moving: int) -> None:
        self._run, self._moving = run, moving
        self._places: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        count = len(tensors) - self._moving
        places = [tensor.data_ptr() for tensor in tensors[:count]]
        if self._refused or places != self._places:  # a first call also compiles kernels and finds their settings
            self._places, self._graph = places, None
            return self._run(*tensors)
        if self._graph is None and not self._record(tensors, count):
            return self._run(*tensors)
        with torch.cuda.device(tensors[0].device):
            for mine, given in zip(self._own, tensors[count:], strict=True):
                mine.copy_(given)
            self._graph.replay()
            return [result.clone() for result in self._results]  # the next replay writes where these lie

    def _record(self, tensors: Sequence[Tensor], count: int) -> bool:
        """Record a call without making it; say whether that could be."""
        graph, self._own = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in tensors[count:]]
        capture = torch.cuda.graph(graph, capture_error_mode="thread_local")  # a loader's thread may copy meanwhile
        try:
            with torch.cuda.device(tensors[0].device), capture:
                self._results = self._run(*tensors[:count], *self._own)
        except RuntimeError:  # it waits for the device, or there is not enough memory for a second set of activations
            self._refused = True
            return False
        self._graph = graph
        return True
