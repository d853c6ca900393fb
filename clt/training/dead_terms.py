"""What dead features of topk and batchtopk are trained by, on their own rows only: AuxK and the pull towards zero.

The same terms as in losses.py; there they reach the whole matrices, whose gradient would be mostly zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from clt.models import CrossLayerTranscoder
from clt.training.gradients import add_to_rows
from clt.training.losses import LossManager


@dataclass(frozen=True)
class _Rows:
    """The dead features of one layer, and copies of their weights that collect a gradient."""

    names: Integer[Tensor, " kept"]
    encoder: Float[Tensor, "kept d_model"]
    bias: Float[Tensor, " kept"]
    decoder: Float[Tensor, "kept _"]


class DeadTerms:
    """The two terms of one micro-batch, and their gradients."""

    def __init__(self, model: CrossLayerTranscoder, losses: LossManager, dead: Bool[Tensor, "layer feature"]) -> None:
        self._model, self._losses = model, losses
        self._rows = [self._of(layer, dead[layer].nonzero()[:, 0]) for layer in range(model.config.num_layers)]

    def _of(self, layer: int, names: Tensor) -> _Rows:
        weights = self._model.W_enc[layer], self._model.b_enc[layer], self._model.W_dec[layer].flatten(1)
        return _Rows(names, *(weight.detach()[names].requires_grad_() for weight in weights))

    @torch.enable_grad()
    def compute(
        self, inputs: Float[Tensor, "layer token d_model"], error: Float[Tensor, "token layer d_model"], share: float
    ) -> tuple[Tensor, Tensor]:
        """Pull and AuxK, with gradients left at the rows.

        Args:
            inputs: of the micro-batch, in the host's units.
            error: what is left over, standardised; carries no gradient.
            share: weight of the micro-batch.
        """
        config, model = self._losses.config, self._model
        wanted = config.aux_k or min(512, max(1, model.config.d_model // 2))
        pull, parts = error.new_zeros(()), []
        for layer, rows in enumerate(self._rows):
            x = model.standardise_inputs(layer, inputs[layer]).to(rows.encoder.dtype)
            h = torch.addmm(rows.bias, x, rows.encoder.T)
            pull = pull + ((-h).relu() * torch.linalg.vector_norm(rows.decoder, dim=1)).sum()
            values, chosen = h.topk(min(wanted, len(rows.names)), dim=1, sorted=False)
            parts.append(torch.zeros_like(h).scatter(1, chosen, values.relu()) @ rows.decoder)
        pull = share * config.preactivation_coef * pull / len(error)
        auxiliary = error.new_zeros(())
        if config.aux_loss_factor is not None:
            left_over = error - model.add_windows(parts).to(error.dtype)
            auxiliary = share * config.aux_loss_factor * self._losses.reconstruction(model, left_over)
        (pull + auxiliary).backward()
        return pull.detach(), auxiliary.detach()

    def add_gradients(self, source: int) -> None:
        """Put a layer's gradients where they belong."""
        rows, model = self._rows[source], self._model
        for value, parameter in (
            (rows.encoder, model.W_enc[source]),
            (rows.bias, model.b_enc[source]),
            (rows.decoder, model.W_dec[source]),
        ):
            if value.grad is not None and len(rows.names):
                add_to_rows(parameter, rows.names, value.grad.view(len(rows.names), *parameter.shape[1:]))
