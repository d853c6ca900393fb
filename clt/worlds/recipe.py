"""What the training of the worlds' hosts shares: the schedule, the optimiser, the record beside the weights."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

RECORD = "train.json"


def optimiser(modules: list[nn.Module], rate: float, weight_decay: float) -> AdamW:
    """AdamW(.9, .98) that decays matrices only."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=rate, betas=(0.9, 0.98))


def schedule(optim: AdamW, steps: int, last: float = 0.05) -> LambdaLR:
    """A twentieth of the steps to warm up, then half a cosine down to `last` of the full rate."""
    warm_up = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(1, steps - warm_up)
        return last + (1 - last) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    return LambdaLR(optim, share)


def update(loss: Tensor, optim: AdamW, rates: LambdaLR) -> None:
    """One step, the gradient clipped to length 1."""
    optim.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optim.param_groups for weight in group["params"]], 1.0)
    optim.step()
    rates.step()


def seconds_of(work: Callable[[], None]) -> dict[str, float]:
    """Seconds of work: on the clock, and of processor time over all threads (a busy machine cannot spoil it)."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return {"wall": round(time.perf_counter() - clock, 1), "cpu": round(time.process_time() - processor, 1)}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """The training record beside the weights, with the versions it was made with."""
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps({**record, "versions": versions, "threads": torch.get_num_threads()}, indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
