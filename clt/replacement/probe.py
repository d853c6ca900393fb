"""Fidelity while a transcoder is trained, as plain numbers for the trackers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clt.config.base import require_positive
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement.fidelity import measure_fidelity
from clt.replacement.model import ReplacementModel
from clt.types import Sample

MEASURES = ("kl", "ce_increase", "loss_recovered", "top1", "top1_filtered", "token_match")


class FidelityProbe:
    """Puts a transcoder in place of all MLPs of a host and measures, always on the same samples.

    trainer = CLTTrainer(config, TrainingConfig(fidelity_interval=500, ...), "runs/gpt2",
                         fidelity=FidelityProbe(adapter, samples, max_new_tokens=24))
    """

    def __init__(
        self, adapter: ModelAdapter, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int = 16
    ) -> None:
        """Let the host answer the samples once; arguments as those of `measure_fidelity`."""
        require_positive("FidelityProbe", max_new_tokens=max_new_tokens, batch_size=batch_size)
        self._adapter, self._samples = adapter, samples
        self._how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self._host_answers = adapter.generate_ids(samples, **self._how)

    def __call__(self, transcoder: BaseTranscoder) -> dict[str, float]:
        """`fidelity/NAME` of each of MEASURES that is defined, its interval as `.../low`, `.../high`, and its count.

        Raises:
            HostModelError, ConfigError: host and transcoder do not fit.
        """
        replacement = ReplacementModel(self._adapter, transcoder)
        report = measure_fidelity(replacement, self._samples, host_answers=self._host_answers, **self._how)
        values: dict[str, float] = {}
        for name in MEASURES:
            measure = getattr(report, name)
            if measure is not None:
                low, high = measure.interval
                own = {"": measure.value, "/low": low, "/high": high, "/n": float(measure.n)}
                values |= {f"fidelity/{name}{part}": value for part, value in own.items()}
        return values
