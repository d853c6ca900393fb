"""What a graph takes in memory and on disk, before its rows are computed.

Everything here is arithmetic on shapes; docs/attribution.md says the same in words and what was measured beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import nn

from clt.attribution.options import AttributionOptions
from clt.attribution.sources import Sources

if TYPE_CHECKING:
    from clt.attribution.attribute import Setting
    from clt.replacement import ReplacementModel

# A pass holds about so many tensors of [row, position, d_model] and of [row, column] at a time, and may take so much.
_PASS_TENSORS, _ROW_TENSORS, _PASS_BYTES = 8, 3, 2e9
_LARGEST_BATCH = 256


@dataclass(frozen=True)
class Plan:
    """Sizes of one graph; bytes unless they say otherwise."""

    n_positions: int
    n_active: int
    n_pairs: int
    """Of an active feature and a layer it writes to."""
    n_rows: int
    """Features with a row of their own, and targets."""
    batch_size: int
    model: int
    """Weights of host and transcoder."""
    patterns: int
    """Attention patterns, where they are not zero."""
    prompt: int
    """What each layer reads and writes, errors, constants and embeddings."""
    pairs: int
    """Numbers of the pairs, and their vectors where they are kept."""
    backward: int
    """One backward pass and the rows it makes."""
    disk: int
    """Rows on disk while they are computed, if no entry were zero."""
    graph: int
    """The finished graph, if no entry were zero."""

    @property
    def memory(self) -> int:
        """Most that is held at a time while rows are computed."""
        return self.model + self.patterns + self.prompt + self.pairs + self.backward

    def to_dict(self) -> dict[str, int]:
        """All sizes, `memory` included."""
        return {**asdict(self), "memory": self.memory}


def bytes_per_row(sources: Sources) -> int:
    """What one row of a batch takes in a backward pass, in float32."""
    return 4 * (_PASS_TENSORS * sources.n_positions * sources.d_model + _ROW_TENSORS * sources.n_columns)


def automatic_batch_size(sources: Sources) -> int:
    """Rows per backward pass that keep a pass within 2 GB."""
    return max(1, min(_LARGEST_BATCH, int(_PASS_BYTES // bytes_per_row(sources))))


def plan_of(model: ReplacementModel, setting: Setting, options: AttributionOptions) -> Plan:
    """The sizes of the graph whose rows would be computed next."""
    sources, linear, n_targets = setting.sources, setting.linear, len(setting.targets.nodes)
    active = len(setting.active)
    selected = active if options.max_feature_nodes is None else min(active, options.max_feature_nodes)
    batch = options.batch_size or automatic_batch_size(sources)
    one = linear.embeddings.numel()
    per_layer = one * sources.n_layers
    return Plan(
        n_positions=sources.n_positions,
        n_active=active,
        n_pairs=sources.n_pairs,
        n_rows=selected + n_targets,
        batch_size=batch,
        model=_bytes(model.adapter.model) + _bytes(setting.transcoder),
        patterns=linear.pattern_bytes,
        prompt=2 * per_layer * linear.reads.element_size() + 4 * (2 * per_layer + 3 * one),
        pairs=12 * sources.n_pairs + sources.kept_bytes + 32 * active,
        backward=batch * bytes_per_row(sources),
        disk=8 * (selected + n_targets) * (sources.n_columns + 1),
        graph=8 * (selected + n_targets) * (selected + sources.n_columns - active + 1),
    )


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
