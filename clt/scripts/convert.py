"""Turn a TopK or BatchTopK transcoder into JumpReLU, and measure what that changes on tokens it has not used.

Reads our transcoders and crosslayer-coding's; --method import only writes the latter as ours.

clt convert --clt runs/batchtopk --output runs/jumprelu
clt convert --clt runs/topk --output runs/jumprelu --data activations/gpt2/pile_train
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from clt.config.base import require_positive, write_text_atomically
from clt.data.stores import LocalActivationStore
from clt.errors import ConfigError, DatasetError
from clt.models import CrossLayerTranscoder
from clt.scripts.train import split_folders
from clt.training.convert import (
    Adaptation,
    Calibration,
    Drift,
    adapt,
    as_jumprelu,
    calibrate,
    common_cut,
    estimate_thresholds,
    kept_per_layer,
    running_thresholds,
)
from clt.training.evaluator import evaluate
from clt.training.loading import load_model
from clt.training.setup import require_same_shape
from clt.types import ActivationBatch, choose_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """A transcoder, where the converted one goes, and how thresholds are found."""

    clt: str
    """Folder of the transcoder, or one file of weights."""
    config: str | None = None
    """Its configuration; None: `cfg.json` beside the weights."""
    output: str
    """Folder for the converted transcoder and `conversion.json`."""
    data: str | None = None
    """Activations; needed for everything but `running` without a report."""
    method: Literal["auto", "running", "adapt", "cut", "estimate", "import"] = "auto"
    """running: batchtopk's own threshold, exactly; cut: one per layer on the ranking, for topk; adapt: the same after
    some training steps with such a cut; estimate: crosslayer-coding's, smallest kept activations, averaged; auto:
    running for batchtopk, else adapt."""
    adaptation: Annotated[Adaptation, tyro.conf.arg(name="adaptation")] = Adaptation()
    """How long adapt trains."""
    norm_stats: str | None = None
    """norm_stats.json of the data that crosslayer-coding's weights were trained on; None: beside weights or data."""
    calibrate: Annotated[bool, tyro.conf.arg(aliases=("--l0-layerwise-calibrate",))] = False
    """Scale each layer's thresholds until its L0 on calibration tokens is the original's."""
    calibration: Annotated[Calibration, tyro.conf.arg(name="calibration")] = Calibration()
    """How."""
    estimation_batches: int = 100
    """Batches for the estimate, as far as the data reach."""
    calibration_batches: int = 8
    """Batches for the calibration."""
    report_batches: int = 20
    """Batches for the report; where there is a held-out split, they come from it."""
    batch_size_tokens: int = 1024
    """Tokens per batch."""
    default_theta_value: float = 1e6
    """Threshold of features that never fired: they stay off."""
    scale_factor: float = 1.0
    """Multiplies every estimated threshold."""
    l0_tolerance: float = 0.5
    """Largest accepted change of a layer's L0."""
    nmse_tolerance: float = 0.05
    """Largest accepted relative change of the NMSE."""
    force: bool = False
    """Write the result even if it drifts more."""
    seed: int = 42
    """Seed of the order of the tokens."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    activation_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which activations are read."""

    def __post_init__(self) -> None:
        require_positive(
            "convert", scale_factor=self.scale_factor, default_theta_value=self.default_theta_value,
            estimation_batches=self.estimation_batches, calibration_batches=self.calibration_batches,
            report_batches=self.report_batches, adaptation_steps=self.adaptation.steps,
            adaptation_learning_rate=self.adaptation.learning_rate,
        )  # fmt: skip


class Parts:
    """Three disjoint parts of one data set: to estimate, to calibrate, to report."""

    def __init__(self, options: Options, model: CrossLayerTranscoder) -> None:
        assert options.data is not None
        train, held_out = split_folders(options.data)
        self._store = self._open(train, options)
        require_same_shape(model.config, self._store)
        self._held_out = None if held_out is None else self._open(held_out, options)
        steps = self._store.steps_per_epoch
        kept = 0 if self._held_out is not None else min(options.report_batches, max(1, steps // 5))
        self._n_report = kept or options.report_batches
        self._n_calibrate = min(options.calibration_batches, max(1, steps // 5))
        self._n_estimate = min(options.estimation_batches, steps - kept - self._n_calibrate)
        self._n_spoken_for = self._n_estimate + self._n_calibrate + kept
        if self._n_estimate < 1:
            raise DatasetError(
                f"{train} has {self._store.total_tokens:,} tokens, {steps} batches of {options.batch_size_tokens:,}: "
                "too few to estimate, calibrate and report on different tokens. Use smaller batches or more data."
            )

    @staticmethod
    def _open(folder: Path, options: Options) -> LocalActivationStore:
        dtype = getattr(torch, options.activation_dtype)
        return LocalActivationStore(folder, batch_size_tokens=options.batch_size_tokens, seed=options.seed, dtype=dtype)

    def estimation(self) -> Iterator[ActivationBatch]:
        """The first batches of the order."""
        return self._batches(0, self._n_estimate)

    def calibration(self) -> list[ActivationBatch]:
        """The next."""
        return list(self._batches(self._n_estimate, self._n_calibrate))

    def training(self, steps: int) -> Iterator[ActivationBatch]:
        """Everything but the tokens to calibrate and report on, as often as it takes."""
        free = [*range(self._n_estimate), *range(self._n_spoken_for, self._store.steps_per_epoch)]
        return (next(self._batches(free[step % len(free)], 1)) for step in range(steps))

    def report(self) -> Iterator[ActivationBatch]:
        """Held-out tokens, or those of the order that come after."""
        if self._held_out is not None:
            return islice(self._held_out.one_pass(), self._n_report)
        return self._batches(self._n_estimate + self._n_calibrate, self._n_report)

    def _batches(self, first: int, count: int) -> Iterator[ActivationBatch]:
        self._store.load_state_dict({**self._store.state_dict(), "epoch": 0, "step": first})
        yield from islice(self._store, count)


def convert(options: Options) -> tuple[CrossLayerTranscoder, Drift | None]:
    """The converted transcoder, and what changed; None without data.

    Raises:
        ConfigError: the family has no choice to convert, or the method needs activations.
        TrainingError: the drift is above the tolerance and not forced.
    """
    device = choose_device(options.device)
    config = None if options.config is None else Path(options.config)
    model = load_model(Path(options.clt), config, device, _norm_stats(options))
    if options.method == "import":
        return model, None
    family = model.config.activation_fn
    if family not in ("topk", "batchtopk"):
        raise ConfigError(
            f"{options.clt} has activation_fn = {family!r}; only topk and batchtopk are converted. "
            "To write another project's weights as ours, give --method import."
        )
    method = options.method if options.method != "auto" else ("running" if family == "batchtopk" else "adapt")
    if method == "adapt" and family != "topk":
        raise ConfigError(
            f"--method adapt is for topk; {options.clt} is {family}, whose threshold is exact: --method running."
        )
    if options.data is None:
        if method != "running" or options.calibrate:
            raise ConfigError("Thresholds of this kind are found on activations. Give --data FOLDER.")
        return as_jumprelu(model, running_thresholds(model)), None
    parts = Parts(options, model)
    estimate = None
    if method == "estimate":  # first: another project's BatchTopK has no threshold before its choice is seen
        estimate = estimate_thresholds(model, parts.estimation(), options.default_theta_value, options.scale_factor)
    before = evaluate(model, parts.report())
    converted, scales = _with_thresholds(model, parts, method, estimate, options)
    drift = Drift(before, evaluate(converted, parts.report()), scales, method)
    if not options.force:
        drift.require_small(options.l0_tolerance, options.nmse_tolerance)
    return converted, drift


def _with_thresholds(
    model: CrossLayerTranscoder, parts: Parts, method: str, estimate: torch.Tensor | None, options: Options
) -> tuple[CrossLayerTranscoder, list[float]]:
    """The transcoder behind thresholds found by a method, and the scales of their calibration."""
    tokens = parts.calibration()
    kept = kept_per_layer(model, tokens)
    match method:
        case "running":
            theta = running_thresholds(model)
        case "adapt":
            l0 = sum(kept) / len(kept) / sum(batch.n_tokens for batch in tokens)
            model = adapt(model, parts.training(options.adaptation.steps), l0, options.adaptation)
            theta = common_cut(model, tokens, kept)
        case "cut":
            theta = common_cut(model, tokens, kept)
        case _:
            assert estimate is not None
            theta = estimate
    scales: list[float] = []
    if options.calibrate:
        scales = calibrate(model, theta, tokens, kept, options.calibration)
        theta = theta * torch.tensor(scales, device=theta.device)[:, None]
    return as_jumprelu(model, theta), scales


def _norm_stats(options: Options) -> Path | None:
    """Statistics that crosslayer-coding's weights may need: those given, or the data set's own."""
    if options.norm_stats is not None:
        return Path(options.norm_stats)
    beside = None if options.data is None else split_folders(options.data)[0] / "norm_stats.json"
    return beside if beside is not None and beside.exists() else None


def describe(drift: Drift) -> str:
    """Before and after, in a few lines."""
    before, after = drift.before, drift.after
    trained = "All weights were trained on (adapt).\n" if drift.method == "adapt" else ""
    return (
        f"{trained}"
        f"On {after.n_tokens:,} tokens not used for conversion: NMSE {before.nmse:.4f} -> {after.nmse:.4f} "
        f"({drift.nmse:+.2%}), L0 per layer {before.l0:.2f} -> {after.l0:.2f} (largest change {drift.l0:.2f})."
    )


def report_json(drift: Drift | None, method: str) -> str:
    """The content of `conversion.json`."""
    if drift is None:
        how = "import" if method == "import" else "running, without activations"
        return json.dumps({"method": f"{how}: the same function"}, indent=2) + "\n"
    values = {"method": drift.method, "l0_drift": drift.l0, "nmse_drift": drift.nmse, "scales": drift.scales}
    sides = {"before": drift.before.to_dict(), "after": drift.after.to_dict()}
    return json.dumps({**values, **sides}, indent=2) + "\n"


def main(options: Options) -> None:
    """Convert, write, and say what changed."""
    converted, drift = convert(options)
    folder = Path(options.output)
    converted.save_pretrained(folder)
    write_text_atomically(folder / "conversion.json", report_json(drift, options.method))
    print(f"Transcoder ({converted.config.activation_fn}) in {folder} (cfg.json, clt.safetensors, conversion.json).")
    if drift is not None:
        print(describe(drift))
