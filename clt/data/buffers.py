"""Memory for batches, used again once nobody holds the batch that lay in it."""

import sys
import threading

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor


class BufferPool:
    """Hands out uninitialised tensors and takes the memory back when the last tensor over it is gone.

    A fresh allocation of tens of megabytes costs a page fault per 4 KiB, which is more than the copy into it. A batch
    that a caller keeps is never written to: its memory is simply not free.

    The memory is a numpy array, because a tensor over it (and every view, slice or `detach` of that tensor) holds
    a reference to the array; how many there are tells whether it is free.
    """

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._arrays: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
        """A tensor of undefined content that shares no memory with any other living tensor."""
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        with self._lock:  # until the tensor holds its reference, another thread would find the array free
            array = self._free(n_bytes)
            if array is None:
                array = np.empty(n_bytes, np.uint8)
                self._arrays = [*self._arrays[-(self._keep - 1) :], array]
            return torch.from_numpy(array).view(dtype).view(shape)

    def _free(self, n_bytes: int) -> np.ndarray | None:
        for index in range(len(self._arrays)):
            # Two references: the list's and getrefcount's own argument.
            if self._arrays[index].nbytes == n_bytes and sys.getrefcount(self._arrays[index]) <= 2:
                return self._arrays[index]
        return None
