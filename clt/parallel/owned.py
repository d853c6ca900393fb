"""Which rows of the weights this rank's optimiser looks after, where copies of a dictionary share that work.

Every copy has all weights and, after their sum, all gradients, but keeps moments for some rows only, updates those, and
is sent the others (Rajbhandari et al. 2020, ZeRO, stage 1). The update of a number needs no other number, so the
weights end as they would with one optimiser.
"""

from __future__ import annotations

import torch
from torch import nn

from clt.models import CrossLayerTranscoder
from clt.models.slices import feature_axis, part_of
from clt.parallel.mesh import Mesh


class Owned:
    """The parameters given to the optimiser: the model's own, or views of some of their rows."""

    def __init__(self, model: CrossLayerTranscoder, mesh: Mesh, is_shared: bool) -> None:
        """Divide the rows among the copies.

        Args:
            model: whose weights.
            mesh: this rank's place; `mesh.dp` are the copies.
            is_shared: False: every copy looks after everything.
        """
        self._model, self._mesh = model, mesh
        self.rows: dict[str, range] = {}
        """Of the parameters that are divided; the others are looked after by every copy."""
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        if not is_shared or mesh.dp.is_alone:
            return
        for name, parameter in model.named_parameters():
            if feature_axis(name) == 0 and len(parameter) >= mesh.dp.size:
                self.rows[name] = part_of(len(parameter), mesh.dp.rank, mesh.dp.size)
                rows = slice(self.rows[name].start, self.rows[name].stop)
                self.parameters[name] = nn.Parameter(parameter.detach()[rows])

    def features(self, name: str) -> range | None:
        """Of the moments `optimizer/<parameter>/<moment>` the features looked after here; None: all of this part's."""
        kind, _, rest = name.partition("/")
        rows = self.rows.get(rest.rsplit("/", 1)[0]) if kind == "optimizer" else None
        first = self._model.peers.first
        return None if rows is None else range(first + rows.start, first + rows.stop)

    def take_gradients(self) -> None:
        """Point the optimiser's views at their rows of the model's gradients."""
        if not self.rows:
            return
        for name, parameter in self._model.named_parameters():
            if name in self.rows:
                rows = slice(self.rows[name].start, self.rows[name].stop)
                self.parameters[name].grad = None if parameter.grad is None else parameter.grad[rows]

    @torch.no_grad()
    def share(self) -> None:
        """Get the rows that the other copies have updated."""
        for name, parameter in self._model.named_parameters():
            if name in self.rows:
                parts = [part_of(len(parameter), copy, self._mesh.dp.size) for copy in range(self._mesh.dp.size)]
                self._mesh.dp.gather_into([parameter[part.start : part.stop] for part in parts], "updated weights")
