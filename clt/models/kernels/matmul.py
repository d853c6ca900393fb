"""Matrix products: in fp32 on a CPU through oneDNN or MKL, whichever a first measurement finds faster.

MKL takes a slow path on some processors, where the same product through oneDNN is two to three times as fast. oneDNN
in turn is hundreds of times slower if the left operand is strided, so that one is made contiguous first.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from clt.models.kernels.build import cache_folder, processor

# Products of fewer multiplications are left to torch: the detour costs more than it gains.
_SMALL = 2**24
_SIZE, _REPEATS = 768, 4
# By so much bf16 products must be faster than fp32's to be worth a further pass over the results.
_MUCH = 1.4


def product(
    a: Float[Tensor, "row inner"], b: Float[Tensor, "inner column"], out: Float[Tensor, "row column"] | None = None
) -> Float[Tensor, "row column"]:
    """a @ b; carries no gradient.

    Args:
        out: where to put it, if that saves memory; the result may also be a new tensor.
    """
    if _goes_to_onednn(a, b):
        return _onednn(a.contiguous(), b)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def add_product(
    out: Float[Tensor, "row column"], a: Float[Tensor, "row inner"], b: Float[Tensor, "inner column"]
) -> None:
    """out += a @ b, where `out` may be wider in type than a and b, and strided."""
    if out.dtype == a.dtype and not _goes_to_onednn(a, b):
        out.addmm_(a, b)
    else:
        out += product(a, b)


def affine(
    x: Float[Tensor, "row inner"], weight: Float[Tensor, "column inner"], bias: Float[Tensor, " column"]
) -> Float[Tensor, "row column"]:
    """x @ weight.T + bias; carries no gradient."""
    if _goes_to_onednn(x, weight.T):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return torch.addmm(bias, x, weight.T)


def _goes_to_onednn(a: Tensor, b: Tensor) -> bool:
    if a.dtype != torch.float32 or a.device.type != "cpu" or a.shape[0] * a.shape[1] * b.shape[1] < _SMALL:
        return False
    return onednn_is_faster()


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products go through oneDNN on this machine: measured once and kept in a file.

    `CLT_MATMUL=onednn` or `torch` decides instead.
    """
    wanted = os.environ.get("CLT_MATMUL")
    if wanted is not None:
        return wanted == "onednn"
    return torch.backends.mkldnn.is_available() and _seconds("onednn") < _seconds("torch")


def bf16_screens(n_multiplications: int) -> bool:
    """Whether an fp32 encoder first looks where its largest results are by bf16 products, which costs a pass more.

    `CLT_SCREEN=1` or `0` decides instead of what was measured.
    """
    wanted = os.environ.get("CLT_SCREEN")
    if wanted is not None:
        return wanted == "1"
    return n_multiplications >= _SMALL and _bf16_is_much_faster()


@functools.cache
def _bf16_is_much_faster() -> bool:
    return _MUCH * _seconds("bf16") < _seconds("onednn" if onednn_is_faster() else "torch")


@functools.cache
def _seconds(way: str) -> float:
    """What a product takes on this machine, one of three ways; all are measured once and kept in a file."""
    path = cache_folder() / "matmul.json"
    key = f"{processor()} torch {torch.__version__} {torch.get_num_threads()} threads"
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    if not isinstance(known.get(key), dict):
        known[key] = _measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=2))
    return known[key][way]


def _measure() -> dict[str, float]:
    """All in turn, best of a few, so that other work on the machine hits all alike."""
    a, b = (torch.rand(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    halves = a.bfloat16(), b.bfloat16()
    ways: dict[str, Callable[[], Tensor]] = {"torch": lambda: torch.mm(a, b), "bf16": lambda: torch.mm(*halves)}
    if torch.backends.mkldnn.is_available():
        ways["onednn"] = lambda: _onednn(a, b)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in seconds.items()}
