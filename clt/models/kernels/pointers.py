"""Which kernels can work on some tensors, and tensors as the C functions take them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from clt.models.kernels.build import library


def compiled(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The compiled kernels, if they can work on these tensors: on a CPU, in fp32 (integers: int64)."""
    if os.environ.get("CLT_KERNELS") == "triton":
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int64):
            return None
    return library()


def on_gpu(*tensors: Tensor | None, module: str = "triton_sparse") -> Any:
    """A module of Triton kernels, if triton is there and the tensors are on a GPU, or `CLT_KERNELS=triton` asks for it.

    On a CPU they need Triton's interpreter (`TRITON_INTERPRET=1`), which is for tests.
    """
    wanted = os.environ.get("CLT_KERNELS", "auto")
    if wanted == "torch" or (wanted != "triton" and any(t is not None and t.device.type != "cuda" for t in tensors)):
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"clt.models.kernels.{module}")


def is_half(h: Tensor) -> bool | None:
    """Whether h holds bf16 (True) or fp32 (False) numbers on a CPU; None: something the kernels do not take."""
    known = {torch.bfloat16: True, torch.float32: False}
    return known.get(h.dtype) if h.device.type == "cpu" and h.is_contiguous() else None


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers lie; None: nowhere."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(function: Any, *arguments: Tensor | int | float | bool | None) -> None:
    """Call a kernel: tensors as pointers, int as int64, bool as int, float as float."""
    function(*(_as_c(argument) for argument in arguments))


def _as_c(argument: Tensor | int | float | bool | None) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return pointer(argument)
    if isinstance(argument, bool):
        return ctypes.c_int(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
