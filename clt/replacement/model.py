"""The replacement model: a host whose MLPs are a cross-layer transcoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from clt.errors import ConfigError
from clt.lm import HostInputs, ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement.intervention import Edit, Interventions
from clt.replacement.loading import check_fit, open_pair
from clt.replacement.passes import Passes
from clt.replacement.recording import FeatureRecord, SampleFeatures
from clt.replacement.running import RunningPrediction
from clt.replacement.statistics import check_std, read_feature_std
from clt.replacement.steerable import Steerable

AnyModel = TypeVar("AnyModel", bound="ReplacementModel")


class ReplacementModel(Steerable):
    """Runs and generates like the host, with every MLP output computed from the features of all layers so far.

    replacement = ReplacementModel.from_pretrained("gpt2", "runs/gpt2")
    replacement.generate(samples, max_new_tokens=32, interventions=Intervention(8, 3648, "scale", 2.0))
    with replacement.active():
        ...                                     # whatever runs the host here runs the replacement
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        transcoder: BaseTranscoder,
        *,
        first_n_layers: int | None = None,
        layers: Sequence[int] | None = None,
        feature_std: Float[Tensor, "layer feature"] | None = None,
        capture_activations: bool = False,
    ) -> None:
        """Check that the two belong together; nothing is put in place yet.

        Args:
            first_n_layers: replace only the first so many MLPs; None: all.
            layers: replace only these MLPs; None: all that the transcoder predicts (one that writes to later layers
                only, without a bias for the first, leaves the first alone).
            feature_std: size of one standard deviation of each feature, for interventions in that unit.
            capture_activations: keep the features of the latest run in `captured`.

        Raises:
            HostModelError: layers, width or hookpoints of host and transcoder differ.
            ConfigError: the transcoder cannot run layer by layer, or a layer is out of range.
        """
        check_fit(adapter, transcoder.config)
        check_std(feature_std, transcoder.config)
        self.adapter = adapter
        self.transcoder = transcoder
        self.layers = _chosen_layers(transcoder, first_n_layers, layers)
        self.n_layers = len(self.layers)
        self.feature_std = feature_std
        self.capture_activations = capture_activations
        self.captured: list[SampleFeatures] = []

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, by {self.transcoder!r})"

    @classmethod
    def from_pretrained(
        cls: type[AnyModel],
        model_name: str | Path | ModelAdapter,
        transcoder_dir: str | Path | BaseTranscoder,
        *,
        capture_activations: bool = False,
        first_n_layers: int | None = None,
        layers: Sequence[int] | None = None,
        feature_std: Float[Tensor, "layer feature"] | None = None,
        **host_options: Any,
    ) -> AnyModel:
        """Open host and transcoder.

        Args:
            model_name: Hugging Face id or folder of the host, world:NAME, or an open one.
            transcoder_dir: folder of a transcoder of ours (cross-layer or per-layer), one with vlm-clt-training's
                `transcoder_L{layer}.pt`, or an open one.
            feature_std: None: as stored in the transcoder's folder, if it is.
            host_options: as `ModelAdapter.from_pretrained`: dtype, device, device_map, ...

        Raises:
            HostModelError, CheckpointError, ConfigError: what cannot be opened, or does not fit, and why.
        """
        adapter, transcoder = open_pair(model_name, transcoder_dir, host_options)
        if feature_std is None and not isinstance(transcoder_dir, BaseTranscoder):
            feature_std = read_feature_std(Path(transcoder_dir))
        return cls(
            adapter,
            transcoder.to(adapter.device),
            first_n_layers=first_n_layers,
            layers=layers,
            feature_std=feature_std,
            capture_activations=capture_activations,
        )

    @contextmanager
    def active(
        self,
        inputs: HostInputs | None = None,
        *,
        interventions: Interventions | None = None,
        cached: bool = True,
        errors: Float[Tensor, "layer row position d_model"] | None = None,
    ) -> Iterator[None]:
        """Put the transcoder in place while the block runs.

        Args:
            inputs: the rows that will run; needed for interventions at positions and for capturing.
            interventions: what to change of the features before they are used.
            cached: whether passes go on where the one before ended; without a KV cache each starts anew.
            errors: what to add to the predictions, for the same rows and from their first position on; with those
                of `errors(inputs)` the host is reproduced. A block then covers one text, in one pass or with a
                KV cache token by token.
        """
        passes = Passes(self.adapter, inputs, cached=cached)
        config = self.transcoder.config
        edit = Edit(interventions, passes, [config.num_features] * config.num_layers, self.feature_std)
        record = None
        if self.capture_activations and inputs is not None:
            record = FeatureRecord(config.num_layers, config.num_features)
        running = RunningPrediction(self.transcoder, self.layers, passes, edit, errors=errors, record=record)
        read = [layer for layer in range(self._n_read) if layer not in self.layers]
        with (
            passes.watching(),
            self.adapter.reading(running.spend, read),
            self.adapter.replacing(running.predict, self.layers),
        ):
            yield
        if record is not None:
            self.captured += record.samples()

    @property
    def _n_read(self) -> int:
        """Up to where layers are read: to the last that is replaced, or to the end if features are to be kept."""
        return self.adapter.n_layers if self.capture_activations else max(self.layers) + 1

    @torch.no_grad()
    def errors(self, inputs: HostInputs) -> Float[Tensor, "layer row position d_model"]:
        """What the transcoder misses on the host's own forward pass: true MLP output minus prediction.

        One layer for each that is replaced, in their order.
        """
        passes = Passes(self.adapter, inputs)
        running = RunningPrediction(self.transcoder, self.layers, passes, Edit(None, passes, []))
        found: list[Tensor] = []

        def compare(layer: int, x: Tensor, y: Tensor) -> Tensor:
            found.append((y - running.predict(layer, x).to(y)).view(*inputs.input_ids.shape, -1))
            return y

        read = [layer for layer in range(max(self.layers)) if layer not in self.layers]
        with (
            passes.watching(),
            self.adapter.reading(running.spend, read),
            self.adapter.rewriting(compare, self.layers),
        ):
            self.adapter.logits(inputs)
        return torch.stack(found)


def _chosen_layers(
    transcoder: BaseTranscoder, first_n_layers: int | None, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Which MLPs are replaced, in order.

    Raises:
        ConfigError: one that is not there, or that the transcoder does not predict; or both arguments given.
    """
    n_layers = transcoder.config.num_layers
    predicted = tuple(layer for layer in range(n_layers) if transcoder.predicts(layer))
    if first_n_layers is not None:
        if layers is not None:
            raise ConfigError("Give first_n_layers or layers, not both.")
        if not 0 < first_n_layers <= n_layers:
            raise ConfigError(f"first_n_layers = {first_n_layers} must be between 1 and the host's {n_layers} layers.")
        chosen = tuple(layer for layer in predicted if layer < first_n_layers)
    else:
        chosen = predicted if layers is None else tuple(sorted(set(layers)))
    unknown = [layer for layer in chosen if layer not in predicted]
    if unknown or not chosen:
        raise ConfigError(
            f"layers = {list(chosen)}: the transcoder predicts the MLP outputs of layers {_ranges(predicted)}. "
            "Choose among those."
        )
    return chosen


def _ranges(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if layers else "none"
