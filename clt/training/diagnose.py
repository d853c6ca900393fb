"""Where a NaN or an infinity comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from clt.models import CrossLayerTranscoder
from clt.training.losses import Losses
from clt.types import ActivationBatch


@torch.no_grad()
def explain_nonfinite(model: CrossLayerTranscoder, losses: Losses, batch: ActivationBatch) -> str:
    """The terms that are not finite, and the first layer at which something is not."""
    terms = {name: float(getattr(losses, name)) for name in Losses.__dataclass_fields__}
    wrong = ", ".join(f"{name} = {value}" for name, value in terms.items() if not abs(value) < float("inf"))
    what = f"the loss is not finite ({wrong}" if wrong else f"a gradient is not finite (loss {sum(terms.values()):.4g}"
    return f"{what}; {_culprit(model, batch)})"


def _culprit(model: CrossLayerTranscoder, batch: ActivationBatch) -> str:
    """Data first, then weights, then gradients, then what is computed from them, layer by layer."""
    for layer in range(batch.n_layers):
        for name in ("inputs", "targets"):
            if _broken(getattr(batch, name)[layer]):
                rows = int((~torch.isfinite(getattr(batch, name)[layer])).any(1).sum())
                return f"layer {layer}: the {name} of {rows} of {batch.n_tokens} tokens in the data"
    for name, value in model.named_parameters():
        if _broken(value):
            return f"layer {_layer_of(name, value)}: weight {name}"
    for name, value in model.named_parameters():
        if value.grad is not None and _broken(value.grad):
            return f"layer {_layer_of(name, value.grad)}: gradient of {name}"
    for layer in range(batch.n_layers):
        if _broken(model.preactivation(layer, model.standardise_inputs(layer, batch.inputs[layer]))):
            return f"layer {layer}: pre-activations"
    return "no single layer: the numbers overflowed in the precision of the computation"


def _broken(value: Tensor) -> bool:
    return not bool(torch.isfinite(value).all())


def _layer_of(name: str, value: Tensor) -> str:
    """`W_enc.3` is of layer 3; of a stacked parameter, the first layer that holds something not finite."""
    tail = name.rsplit(".", 1)[-1]
    if tail.isdigit():
        return tail
    broken = (~torch.isfinite(value)).flatten(1).any(1).nonzero() if value.dim() > 1 else value.new_zeros(0)
    return str(int(broken[0, 0])) if len(broken) else "?"
