"""Several replacements of one host side by side, and one with more and more of its layers in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clt.config.base import require_positive
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement.ablation import MeanAblated, mean_outputs
from clt.replacement.fidelity import FidelityReport, measure_fidelity
from clt.replacement.model import ReplacementModel
from clt.replacement.steerable import Steerable
from clt.types import Sample

MEAN = "mean"
"""Name of the mean-ablated host in a comparison."""


def compare(
    adapter: ModelAdapter, transcoders: Mapping[str, BaseTranscoder], samples: Sequence[Sample], **options: Any
) -> dict[str, FidelityReport]:
    """Every transcoder in place of all MLPs it predicts, and (as `mean`) the MLPs at their mean output.

    Args:
        transcoders: by the names they are to have in the result.
        options: as `measure_fidelity`: max_new_tokens, batch_size, n_resamples, seed.
    """
    models: dict[str, Steerable] = {
        name: ReplacementModel(adapter, transcoder) for name, transcoder in transcoders.items()
    }
    means = mean_outputs(adapter, samples, options.get("batch_size", 16))
    return _measured(adapter, {**models, MEAN: MeanAblated(adapter, means, range(adapter.n_layers))}, samples, options)


def by_layers(
    adapter: ModelAdapter,
    transcoder: BaseTranscoder,
    samples: Sequence[Sample],
    counts: Sequence[int],
    **options: Any,
) -> dict[int, FidelityReport]:
    """The same transcoder in place of the first so many MLPs, for each count; options as `measure_fidelity`."""
    models: dict[str, Steerable] = {
        str(count): ReplacementModel(adapter, transcoder, first_n_layers=count) for count in counts
    }
    return {int(count): report for count, report in _measured(adapter, models, samples, options).items()}


def layer_counts(n_layers: int, n_points: int = 8, first: int = 1) -> list[int]:
    """At most so many numbers of layers, evenly spread from `first` to all."""
    require_positive("layer_counts", n_layers=n_layers, n_points=n_points)
    spread = range(n_points) if n_points > 1 else (1,)
    last = max(n_points - 1, 1)
    return sorted({round(first + (n_layers - first) * point / last) for point in spread})


def _measured(
    adapter: ModelAdapter, models: Mapping[str, Steerable], samples: Sequence[Sample], options: dict[str, Any]
) -> dict[str, FidelityReport]:
    """One report per model; the host's answers are generated once."""
    how = {name: options[name] for name in ("max_new_tokens", "batch_size") if name in options}
    answers = adapter.generate_ids(samples, **how)
    return {name: measure_fidelity(model, samples, host_answers=answers, **options) for name, model in models.items()}
